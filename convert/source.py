"""Where a conversion reads from: a checkpoint's small files, and its tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.errors import MissingFileError, UsageError
from mlx_resonance.files import (
    WEIGHTS,
    TensorInfo,
    check_types,
    hub_errors,
    indexed_files,
    merge_headers,
    read_config,
    read_header,
    resolve,
    user_path,
    weight_files,
)
from mlx_resonance.tokenizer import TOKENIZER_PATTERNS

import mlx.core as mx

from . import fp8
from .card import base_models
from .torch_file import TorchFile

SMALL_FILES = [*TOKENIZER_PATTERNS, "README.md"]
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
TYPES = {"F32", "F16", "BF16", "U32", "U8", "F8_E4M3"}  # U32 and U8: weights and scales that mlx-lm has quantized


class WeightFile(Protocol):
    """A file of tensors, none read yet."""

    name: str
    tensors: dict[str, TensorInfo]
    download: int
    """Bytes that reading it will download."""

    def read(self, tensor: str) -> mx.array:
        """One tensor, lazy or not."""

    def release(self) -> None:
        """None of its tensors will be read again."""


class SafetensorsFile:
    """A safetensors file on disk; raises ValueError where its header cannot be right."""

    download = 0

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.tensors = path, path.name, read_header(path)

    def read(self, tensor: str) -> mx.array:
        """One tensor, lazy."""
        try:
            tensors: dict[str, mx.array] = mx.load(str(self.path), format="safetensors")  # type: ignore[assignment]
        except RuntimeError as error:
            raise UsageError(f"MLX cannot read {self.path}: {error}") from None
        return tensors[tensor]

    def release(self) -> None:
        """It is the user's: it stays."""


class HubFile:
    """A safetensors file on the hub: its header now, its data when a tensor is read, and only until it is released.

    Args:
        repo, commit, name: of the file.
        folder: where to download it to. A file that is in the hub's cache is read there and stays.
    """

    def __init__(self, repo: str, commit: str, name: str, folder: Path) -> None:
        from huggingface_hub import HfApi, try_to_load_from_cache
        from huggingface_hub.errors import SafetensorsParsingError

        self.repo, self.commit, self.name, self.folder = repo, commit, name, folder
        cached = try_to_load_from_cache(repo, name, revision=commit)
        self.cached = Path(cached) if isinstance(cached, str) else None
        try:
            with hub_errors(repo):
                header = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit).tensors
            self.tensors = {key: TensorInfo(info.dtype, tuple(info.shape)) for key, info in header.items()}
            check_types(self.tensors, f"{repo}/{name}")
        except (SafetensorsParsingError, TypeError) as error:
            raise UsageError(f"{repo}/{name} has a damaged header: {error}") from None
        self.download = 0 if self.cached else sum(info.nbytes for info in self.tensors.values())

    def read(self, tensor: str) -> mx.array:
        """One tensor, lazy; the first one downloads the file."""
        from huggingface_hub import hf_hub_download

        path = self.cached or self.folder / self.name
        if not path.is_file():
            with hub_errors(self.repo):
                hf_hub_download(self.repo, self.name, revision=self.commit, local_dir=self.folder)
        file = SafetensorsFile(path)
        if file.tensors != self.tensors:
            raise UsageError(f"{path} has other tensors than its header on the hub: delete it")
        return file.read(tensor)

    def release(self) -> None:
        """Delete what was downloaded."""
        (self.folder / self.name).unlink(missing_ok=True)


class Source:
    """A checkpoint to convert.

    Args:
        name: folder or hub id.
        commit: of the hub.
        folder: config.json, tokenizer, card.
        files: of weights.

    Raises:
        UsageError: a tensor is in two files or of a type that cannot be converted, or all are quantized in a format
            that is not read.
    """

    def __init__(self, name: str, commit: str | None, folder: Path, files: Sequence[WeightFile]) -> None:
        self.name, self.commit, self.folder, self.files = name, commit, folder, files
        found = merge_headers({file.name: file.tensors for file in files})
        self._file = {name: file for file in files for name in file.tensors}
        for name, info in found.items():
            if info.dtype not in TYPES:
                raise UsageError(f"{name} is of type {info.dtype}: supported are float32, float16, bfloat16")
        config = read_config(folder)
        self._scales: fp8.Scales = {}
        foreign = config.get("quantization_config") or None
        if foreign and foreign != config.get("quantization"):
            self._scales, found = fp8.scales(foreign, config, found, base_models(folder))
            del config["quantization_config"]
        for name, info in found.items():
            if info.dtype == "F8_E4M3" and name not in self._scales:
                raise UsageError(f"{name} is in 8-bit float without a scale: convert the original checkpoint")
        self.tensors = {
            name: info._replace(dtype=self._scales[name].dtype) if name in self._scales else info
            for name, info in found.items()
        }
        self.checkpoint = Checkpoint.of(name, folder, config, {"": self.tensors})
        self._left = {
            file.name: {part for name in found for part in self._parts(name)} & set(file.tensors) for file in files
        }

    def read(self, name: str) -> mx.array:
        """A tensor, lazy or not; 8-bit floats come multiplied by their scales, in bfloat16 or as config.json says."""
        value = self._file[name].read(name)
        scale = self._scales.get(name)
        return value if scale is None else scale.dequantize(value, self._file[scale.name].read(scale.name))

    def release(self, names: Iterable[str]) -> None:
        """Say which tensors will not be read again; a file without any left is released."""
        for name in names:
            for part in self._parts(name):
                file = self._file[part]
                self._left[file.name].discard(part)
                if not self._left[file.name]:
                    file.release()

    def _parts(self, name: str) -> list[str]:
        return [name, *([self._scales[name].name] if name in self._scales else [])]


def open_source(src: str | Path, revision: str | None = None, downloads: Path | None = None) -> Source:
    """A folder, or a model of the Hugging Face hub.

    Args:
        src: folder or hub id.
        revision: branch, tag or commit on the hub.
        downloads: for a model of the hub, a folder for its weight files, which are downloaded when they are read and
            deleted when they are released; None for all of them in the hub's cache, now.

    Raises:
        MissingFileError: neither, or a file is missing.
        OSError: the connection broke.
        UsageError: a file that cannot be right, or a format that is not read.
    """
    is_folder = user_path(src).exists()
    remote = downloads is not None and not is_folder and not _offline()
    folder = resolve(src, revision, SMALL_FILES if remote else [*SMALL_FILES, WEIGHTS])
    name, commit = (folder.resolve().name, None) if is_folder else (str(src), folder.name)
    files: list[WeightFile]
    if remote and downloads is not None and commit is not None:
        files = [HubFile(name, commit, file, downloads) for file in _hub_files(name, commit, folder)]
    elif indexed_files(folder) is not None or any(folder.glob(WEIGHTS)):
        files = [SafetensorsFile(path) for path in weight_files(folder)]
    else:
        folder = resolve(src, revision, [*SMALL_FILES, TORCH_WEIGHTS])
        if not any(folder.glob(TORCH_WEIGHTS)) and indexed_files(folder, TORCH_INDEX) is None:
            raise MissingFileError(f"{src} has no {WEIGHTS}, and no {TORCH_WEIGHTS}")
        files = [TorchFile(path) for path in weight_files(folder, TORCH_WEIGHTS, TORCH_INDEX)]
    return Source(name, commit, folder, files)


def mlx_folder(folder: Path) -> Source:
    """A folder that `convert` has written. Raises as `Source`."""
    return Source(folder.name, None, folder, [SafetensorsFile(path) for path in weight_files(folder)])


def cached_source(name: str, commit: str) -> Source | None:
    """A model of the hub as the cache has it; None where a file of it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
        return Source(name, commit, folder, [SafetensorsFile(path) for path in weight_files(folder)])
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def _hub_files(repo: str, commit: str, folder: Path) -> list[str]:
    from huggingface_hub import HfApi

    names = indexed_files(folder)
    if names is None:
        with hub_errors(repo):
            names = [name for name in HfApi().list_repo_files(repo, revision=commit) if fnmatch(name, WEIGHTS)]
    if not names:
        raise MissingFileError(f"{repo} has no {WEIGHTS}: nothing else can be read without all of it here")
    return sorted(names)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
