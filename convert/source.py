"""Where a conversion reads from: an opened checkpoint, and its tensors, one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.errors import MissingFileError, UsageError
from mlx_resonance.files import (
    WEIGHTS,
    TensorInfo,
    hub_errors,
    indexed_files,
    merge_headers,
    read_config,
    resolve,
    user_path,
    weight_files,
)
from mlx_resonance.inspection import RECORDS
from mlx_resonance.rope_types import ORIGINAL
from mlx_resonance.tokenizer import TOKENIZER_PATTERNS, tokenizer_files
from mlx_resonance.validation import without_leftover

import mlx.core as mx
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from . import fp8
from .card import base_models
from .journal import fingerprint
from .quantization import QuantizationArguments, arguments_of, dequantize, group_parts
from .weight_files import HubFile, SafetensorsFile, TorchFile, WeightFile

SMALL_FILES = [*TOKENIZER_PATTERNS, *RECORDS, "README.md"]
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
TYPES = {"F32", "F16", "BF16", "U32", "U8", "F8_E4M3"}  # U32 and U8: weights and scales that mlx-lm has quantized
DYNAMIC_YARN = ("dynamic-yarn", "dynamic_yarn", "yarn-dynamic", "yarn_dynamic")


class Source:
    """An opened checkpoint and its weight files, from which tensors are read one at a time.

    Args:
        name: folder or hub id.
        commit: of the hub; None for a folder.
        folder: config.json, tokenizer, card.
        files: of weights.
        rescaled: whether its scaling will be replaced, so that it may be one that is only applied to longer texts.

    Attributes:
        stored: all tensors, as the files' headers have them.
        scale_of: by 8-bit floats, which of them are the scales that `read` multiplies them by.
        left_out: which of them a conversion leaves out, and why nothing is lost without them.
        renamed: the name in the files of each tensor of the model that has another one there.
        config_digest: of config.json as it was read.
        checkpoint: with the other tensors; 8-bit floats have the type that they are read as.
        dtype: what a result has unless asked otherwise; None for each tensor's own.
        copies: how many of a tensor are in memory when it is read.

    Raises:
        UsageError: a tensor is in two files or of a type that cannot be converted, all are quantized in a format that
            is not read, or config.json does not fit the tensors.
    """

    dtype: str | None = None
    copies = 1

    def __init__(
        self, name: str, commit: str | None, folder: Path, files: Sequence[WeightFile], rescaled: bool = False
    ) -> None:
        self.commit, self.files = commit, files
        self.stored = merge_headers({file.name: file.tensors for file in files})
        for tensor, info in self.stored.items():
            if info.dtype not in TYPES:
                raise UsageError(f"{tensor} is of type {info.dtype}: supported are float32, float16, bfloat16")
        config = read_config(folder)
        self.config_digest = digest(config)
        config = without_leftover(config)
        config = _as_trained(config) if rescaled else config
        self._scales: fp8.Scales = {}
        self.left_out = {tensor: reason for file in files for tensor, reason in file.left_out.items()}
        foreign = config.get("quantization_config") or None
        if foreign and foreign != config.get("quantization"):
            self._scales = fp8.scales(foreign, config, self.stored, base_models(folder))
            of_activations = [tensor for tensor in self.stored if tensor.endswith(fp8.ACTIVATIONS)]
            self.left_out |= dict.fromkeys(of_activations, "a scale of activations, which are not quantized here")
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        for tensor, info in self.stored.items():
            if info.dtype == "F8_E4M3" and tensor not in self._scales:
                raise UsageError(f"{tensor} is an 8-bit float without a scale: convert the original checkpoint")
            if tensor.endswith("rotary_emb.inv_freq"):
                self.left_out[tensor] = "computed from config.json"
        self._file = {tensor: file for file in files for tensor in file.tensors}
        self.scale_of = {tensor: scale.name for tensor, scale in self._scales.items()}
        taken = set(self.stored) - set(self.scale_of.values()) - set(self.left_out)
        headers = {file.name: {name: self._as_read(name) for name in file.tensors if name in taken} for file in files}
        # A file on the hub is downloaded when it is read, which is not now: `read` compares the two then.
        here = not any(self._file[name].download for name in taken if name.startswith(("lm_head.", "model.embed_")))
        self.checkpoint = Checkpoint.of(name, folder, config, headers, self._same if here else None)
        head = self.checkpoint.head
        self._heads = {embedding: stored for stored, embedding in head.left_out.items()}
        self._unseen = set() if head.compared else set(self._heads)
        self.left_out = dict(sorted({**self.left_out, **head.reasons()}.items()))
        self.renamed = {name: stored for stored, name in head.renamed.items()}
        read = {part for tensor in self.checkpoint.tensors for part in self._parts(tensor)}
        self._left = {file.name: read & set(file.tensors) for file in files}

    def read(self, name: str) -> mx.array:
        """A tensor, lazy or not; 8-bit floats come multiplied by their scales, in bfloat16 or as config.json says.

        Raises:
            UsageError: the embedding is tied to a head that differs from it.
        """
        value = self.read_stored(self.renamed.get(name, name))
        if name in self._unseen:
            if not self._same(self._heads[name], name):
                raise UsageError(
                    f"{self._heads[name]} differs from {name}, to which config.json ties it: a source that is "
                    "consumed while it is read cannot be untied",
                    remedies=[{"consume_source": False}],
                )
            self._unseen.remove(name)
            self.left_out |= replace(self.checkpoint.head, compared=True).reasons()
        return value

    def read_stored(self, stored: str) -> mx.array:
        """A tensor by its name in the files."""
        value, scale = self._file[stored].read(stored), self._scales.get(stored)
        return value if scale is None else scale.dequantize(value, self._file[scale.name].read(scale.name))

    def read_again(self, stored: str) -> mx.array:
        """`read_stored`, by another route where there is one: for verification."""
        return self.read_stored(stored) if stored in self._scales else self._file[stored].read_again(stored)

    def identity(self) -> dict[str, Any]:
        """What the record says of the source, and what tells whether it has changed: a commit, or the files."""
        name, folder = self.checkpoint.name, self.checkpoint.folder
        if self.commit is not None:
            return {"name": name, "commit": self.commit}
        known = {"config.json": self.config_digest} | {file.name: digest(file.tensors) for file in self.files}
        files = [folder / file for file in known]
        return {"name": name, "commit": None, **fingerprint([*files, *tokenizer_files(folder)], known)}

    def rope_problem(self) -> str | None:
        """What verification finds wrong in how the source was read; nothing where its files say it outright."""
        return None

    def _same(self, one: str, other: str) -> bool:
        return bool(mx.array_equal(self.read_stored(one), self.read_stored(other), equal_nan=True).item())

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The checkpoint's tensors that belong together, as of `group_parts`."""
        return group_parts(self.checkpoint.tensors, self._quantized)

    def read_float32(self, name: str) -> mx.array:
        """A tensor of `groups` in float32; a quantized one is dequantized."""
        return dequantize([self.read(part) for part in self.groups[name]], self._quantized.get(name))

    @cached_property
    def _quantized(self) -> dict[str, QuantizationArguments]:
        return arguments_of(self.checkpoint.tensors, self.checkpoint.config.get("quantization"))

    def release(self, names: Iterable[str]) -> None:
        """Say which tensors will not be read again; a file without any left is released."""
        for name in names:
            for part in self._parts(name):
                file = self._file[part]
                self._left[file.name].discard(part)
                if not self._left[file.name]:
                    file.release()

    def _as_read(self, name: str) -> TensorInfo:
        info, scale = self.stored[name], self._scales.get(name)
        return info if scale is None else info._replace(dtype=scale.dtype)

    def _parts(self, name: str) -> list[str]:
        """The tensors of the files that are read for one of the model."""
        name = self.renamed.get(name, name)
        parts = [name, *([self._scales[name].name] if name in self._scales else [])]
        return parts + ([self._heads[name]] if name in self._heads else [])


def _as_trained(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without a dynamic YaRN, with which nothing was trained: it scales only texts past the context."""
    found = [value for key in ("rope_scaling", "rope_parameters") if isinstance(value := config.get(key), dict)]
    for scaling in found:
        if (scaling.get("rope_type") or scaling.get("type")) in DYNAMIC_YARN:
            if scaling.get("finetuned"):
                raise UsageError(
                    "the checkpoint was trained with a dynamic YaRN, whose factor config.json does not state: write "
                    "rope_type yarn and its factor there"
                )
            length = scaling.get(ORIGINAL) or config.get("max_position_embeddings")
            base = scaling.get("rope_theta") or config.get("rope_theta")
            plain = {"rope_scaling": None, "rope_parameters": None, "rope_theta": base}
            return config | plain | {"max_position_embeddings": length}
    return config


def digest(value: Any) -> str:
    """The SHA-256, shortened, of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def open_source(
    src: str | Path,
    revision: str | None = None,
    downloads: Path | None = None,
    rescaled: bool = False,
    file: str | None = None,
) -> Source:
    """A folder, a GGUF file, or a model of the Hugging Face hub.

    Args:
        src: folder, file or hub id.
        revision: branch, tag or commit on the hub.
        downloads: for a model of the hub, a folder for its weight files, which are downloaded when they are read and
            deleted when they are released; those in the hub's cache are read there. None for all of them in the cache,
            now.
        rescaled: as of `Source`.
        file: the name of a GGUF file in the folder or repository; None for the only one, where there are no other
            weights.

    Raises:
        MissingFileError: none of these, or a file is missing.
        OSError: the connection broke.
        UsageError: a file that cannot be right, or a format that is not read.
    """
    if not str(src).strip():
        raise UsageError("the name of the source is empty")
    from .gguf_source import open_gguf  # which imports Source

    path = user_path(src)
    is_here = path.exists()
    if is_here and revision is not None:
        raise UsageError(f"{src} is on the disk: only models of the hub have revisions", option="revision")
    if file is not None or (path.suffix == ".gguf" and path.is_file()):
        return open_gguf(src, file, revision, rescaled, download=downloads is None)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{src} is not a .gguf file: expected one, or a folder")
    remote = downloads is not None and not is_here and not constants.HF_HUB_OFFLINE
    folder = resolve(src, revision, SMALL_FILES if remote else [*SMALL_FILES, WEIGHTS])
    name, commit = (folder.resolve().name, None) if is_here else (str(src), folder.name)
    files: list[WeightFile]
    if remote and downloads is not None and commit is not None:
        names = _hub_files(name, commit, folder)
        if all(name.endswith(".gguf") for name in names):
            return open_gguf(src, None, commit, rescaled, download=False)
        files = [_hub_file(name, commit, file, downloads) for file in names]
    elif indexed_files(folder) is not None or any(folder.glob(WEIGHTS)):
        files = [SafetensorsFile(path) for path in weight_files(folder)]
    else:
        folder = resolve(src, revision, [*SMALL_FILES, TORCH_WEIGHTS])
        if not any(folder.glob(TORCH_WEIGHTS)) and indexed_files(folder, TORCH_INDEX) is None:
            return open_gguf(src, None, commit, rescaled)
        files = [TorchFile(path) for path in weight_files(folder, TORCH_WEIGHTS, TORCH_INDEX)]
    return Source(name, commit, folder, files, rescaled)


def mlx_folder(folder: Path, name: str | None = None, commit: str | None = None, rescaled: bool = False) -> Source:
    """A folder of safetensors, such as `convert` writes. Arguments and errors as of `Source`."""
    files = [SafetensorsFile(path) for path in weight_files(folder)]
    return Source(name or folder.name, commit, folder, files, rescaled)


def cached_source(name: str, commit: str, file: str | None = None) -> Source | None:
    """A model of the hub as the cache has it, or a GGUF file of it; None where a file is missing."""
    from .gguf_source import cached_gguf  # which imports Source

    try:
        if file is not None:
            return cached_gguf(name, commit, file)
        wanted = [*SMALL_FILES, WEIGHTS]
        folder = snapshot_download(name, revision=commit, local_files_only=True, allow_patterns=wanted)
        return mlx_folder(Path(folder), name, commit, rescaled=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def _hub_file(repo: str, commit: str, name: str, folder: Path) -> WeightFile:
    cached = try_to_load_from_cache(repo, name, revision=commit)
    return SafetensorsFile(Path(cached)) if isinstance(cached, str) else HubFile(repo, commit, name, folder)


def _hub_files(repo: str, commit: str, folder: Path) -> list[str]:
    names = indexed_files(folder)
    if names is None:
        with hub_errors(repo):
            found = HfApi().list_repo_files(repo, revision=commit)
        names = [name for name in found if fnmatch(name, WEIGHTS)] or [name for name in found if name.endswith(".gguf")]
    if not names:
        raise MissingFileError(f"{repo} has no {WEIGHTS}: other formats must be downloaded in full")
    return sorted(names)
