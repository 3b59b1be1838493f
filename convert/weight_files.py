"""Files of weights: safetensors on disk or on the hub, and PyTorch's .bin files; `gguf_file.py` has another one."""

from __future__ import annotations

import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.files import TensorInfo, check_types, hub_errors, read_header, read_layout

import mlx.core as mx
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import SafetensorsParsingError

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
SAFE_VERSION = (2, 6)  # before it, weights_only could be made to run code (CVE-2025-32434)


class WeightFile(ABC):
    """A file of tensors, none read yet.

    Attributes:
        download: bytes that reading it will download.
        left_out: those of its tensors that a conversion leaves out, and where what they say is.
    """

    name: str
    tensors: dict[str, TensorInfo]
    download = 0
    left_out: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def read(self, tensor: str) -> mx.array:
        """One tensor, lazy or not."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of its tensors, read from the file again: for verification, which trusts nothing read before."""

    def read_again(self, tensor: str) -> mx.array:
        """One tensor by another route, where there is one: for verification, too."""
        return self.read(tensor)

    def release(self) -> None:  # noqa: B027
        """None of its tensors will be read again. A file of the user's, or in the hub's cache, is kept."""


class SafetensorsFile(WeightFile):
    """A safetensors file on disk; raises UsageError where its header cannot be right."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.tensors = path, path.name, read_header(path)

    def read(self, tensor: str) -> mx.array:
        """One tensor, lazy."""
        try:
            tensors: dict[str, mx.array] = mx.load(str(self.path), format="safetensors")  # type: ignore[assignment]
        except RuntimeError as error:
            raise UsageError(f"MLX cannot read {self.path}: {error}") from None
        return tensors[tensor]

    def names(self) -> list[str]:
        """As the header has them."""
        return list(read_layout(self.path))


class HubFile(WeightFile):
    """A safetensors file on the hub: its header now, its data from the first tensor that is read to the release.

    Args:
        repo, commit, name: of the file.
        folder: where to download it to.
    """

    def __init__(self, repo: str, commit: str, name: str, folder: Path) -> None:
        self.repo, self.commit, self.name, self.folder = repo, commit, name, folder
        self._local: SafetensorsFile | None = None
        try:
            with hub_errors(repo):
                header = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit).tensors
            stored = sorted(header.items(), key=lambda item: item[1].data_offsets)  # as in a file that is there
            self.tensors = {key: TensorInfo(info.dtype, tuple(info.shape)) for key, info in stored}
            check_types(self.tensors, f"{repo}/{name}")
        except (SafetensorsParsingError, TypeError) as error:
            raise UsageError(f"{repo}/{name} has a damaged header: {error}") from None
        self.download = sum(info.nbytes for info in self.tensors.values())

    def read(self, tensor: str) -> mx.array:
        """One tensor, lazy; the first one downloads the file."""
        if self._local is None:
            path = self.folder / self.name
            if not path.is_file():
                with hub_errors(self.repo):
                    hf_hub_download(self.repo, self.name, revision=self.commit, local_dir=self.folder)
            self._local = SafetensorsFile(path)
            if self._local.tensors != self.tensors:
                raise UsageError(f"{path} has other tensors than its header on the hub: delete it")
        return self._local.read(tensor)

    def names(self) -> list[str]:
        """As the header on the hub has them."""
        with hub_errors(self.repo):
            return list(HfApi().parse_safetensors_file_metadata(self.repo, self.name, revision=self.commit).tensors)

    def release(self) -> None:
        """Delete what was downloaded."""
        self._local = None
        (self.folder / self.name).unlink(missing_ok=True)


class TorchFile(WeightFile):
    """A file that torch has saved, read only through its weights_only loader, which runs no code that it may hold.

    It is mapped again for every tensor, so that no other stays in memory.

    Raises:
        UsageError: torch is missing or too old, or the file holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.tensors = {}
        for name, value in self._load().items():
            dtype = str(value.dtype).removeprefix("torch.")
            self.tensors[name] = TensorInfo(NAMES.get(dtype, dtype), tuple(value.shape))

    def read(self, tensor: str) -> mx.array:
        """One tensor."""
        import torch

        value = self._load()[tensor].contiguous()
        name = self.tensors[tensor].dtype
        if name == "BF16":  # NumPy has no such type
            return mx.array(value.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array((value.view(torch.uint8) if name == "F8_E4M3" else value).numpy())

    def names(self) -> list[str]:
        """As torch reads them."""
        return list(self._load())

    def _load(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError:
            raise UsageError(f"{self.path} is a PyTorch file: install torch to read it") from None
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_VERSION:
            raise UsageError(f"{self.path}: torch {torch.__version__} reads such files unsafely, install 2.6 or later")
        if not zipfile.is_zipfile(self.path):
            raise UsageError(f"{self.path} is damaged, or a file of torch before 1.6: save it again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the unpickler and the zip reader raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"{self.path} is damaged, or not a file of tensors only: {reason}") from None
        if not isinstance(state, dict):
            raise UsageError(f"{self.path} holds a {type(state).__name__}: expected tensors by name")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise UsageError(f"{self.path}: {name} is not a tensor")
            if value.device.type != "cpu" or value.is_quantized or value.is_neg() or value.is_conj():
                raise UsageError(f"{self.path}: {name} is not a plain tensor")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UsageError(f"{self.path}: {name} of shape {tuple(value.shape)} is larger than its data")
        return {name: value.detach() for name, value in state.items()}
