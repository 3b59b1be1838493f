"""A GGUF file of weights: its tensors under Hugging Face's names, dequantized one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.files import TensorInfo

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, quants

from .gguf_header import GgufHeader, GgufTensor
from .weight_files import WeightFile

AT_ONCE = 2**22  # elements that are dequantized at once
KEPT = {GGMLQuantizationType.F32: "F32", GGMLQuantizationType.F16: "F16", GGMLQuantizationType.BF16: "BF16"}
FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
# llama.cpp's names of layers, and Hugging Face's. Names without a counterpart stay as they are.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class GgufFile(WeightFile):
    """A GGUF file whose header has been read.

    Args:
        path, header: of the file.
        heads: of queries and of keys, where llama.cpp keeps the two halves of each head's rows interleaved.

    Raises:
        UsageError: a tensor is of a type that is not dequantized.
    """

    def __init__(self, path: Path, header: GgufHeader, heads: tuple[int, int] | None) -> None:
        self.path, self.name, self.digest = path, path.name, header.digest
        self._heads = heads
        self._reader: dict[str, Any] | None = None
        self._stored: dict[str, GgufTensor] = {}
        self.tensors, self.left_out = {}, {}
        for name, tensor in header.tensors.items():
            check_kind(path, name, tensor.kind)
            new = hugging_face_name(name)
            if new in self.tensors:
                raise UsageError(f"{path} has {new} under two names, one of which is {name!r:.80}")
            self._stored[new] = tensor
            self.tensors[new] = TensorInfo(KEPT.get(tensor.kind, "F32"), tensor.shape)
            if name in {f"{factor}.weight" for factor in FACTORS}:
                self.left_out[new] = "its factors are in config.json"

    def read(self, tensor: str) -> mx.array:
        """One tensor: float32, float16 and bfloat16 as they are, other types dequantized to float32."""
        found = self._stored[tensor]
        value = dequantized(self.path, found)
        if heads := self._interleaved(tensor):
            halves = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2)
            value = np.ascontiguousarray(halves).reshape(value.shape)
        array = mx.array(value)
        return array.view(mx.bfloat16) if found.kind == GGMLQuantizationType.BF16 else array

    def names(self) -> list[str]:
        """As the gguf package reads them."""
        return list(self._read_anew())

    def read_again(self, tensor: str) -> mx.array:
        """One tensor by another route: found by the gguf package, whose halves are put in order by index."""
        found = self._read_anew()[tensor]
        value = quants.dequantize(found.data, found.tensor_type)
        if heads := self._interleaved(tensor):
            rows = np.arange(len(value))
            width = len(value) // heads
            head, place = rows // width, rows % width
            value = value[head * width + place % (width // 2) * 2 + place // (width // 2)]
        return mx.array(value)

    def release(self) -> None:
        """Forget what was read for verification."""
        self._reader = None

    def _interleaved(self, tensor: str) -> int:
        """The number of heads whose rows are interleaved; 0 for other tensors."""
        found = re.fullmatch(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)", tensor)
        return 0 if found is None or self._heads is None else self._heads[found[1] == "k"]

    def _read_anew(self) -> dict[str, Any]:
        if self._reader is None:
            try:
                reader = GGUFReader(self.path)
            except Exception as error:  # whatever it raises for files that are rarer than those it was made for
                raise UsageError(f"{self.path} cannot be read by the gguf package: {error!r:.200}") from None
            self._reader = {hugging_face_name(found.name): found for found in reader.tensors}
        return self._reader


def hugging_face_name(name: str) -> str:
    """The name of a tensor in a Hugging Face checkpoint."""
    if found := re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", name):
        if found[2] in INNER:
            return f"model.layers.{found[1]}.{INNER[found[2]]}.{found[3]}"
    elif (found := re.fullmatch(r"(\w+)\.(weight|bias)", name)) and found[1] in OUTER:
        return f"{OUTER[found[1]]}.{found[2]}"
    return name


def check_kind(path: Path, name: str, kind: GGMLQuantizationType) -> None:
    """Raise UsageError if the gguf package does not dequantize a type."""
    if kind in KEPT:
        return
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise UsageError(f"{path}: {name!r:.80} is of type {kind.name}, which cannot be dequantized") from None


def dequantized(path: Path, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """A tensor of a file, a few rows at a time; bfloat16 as the uint16 of its bits."""
    dtype = {GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.BF16: np.uint16}.get(tensor.kind, np.float32)
    value = np.empty(tensor.shape, dtype)
    rows = value.reshape(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes // len(rows)
    step = max(1, AT_ONCE // tensor.shape[-1])
    with path.open("rb") as file:
        file.seek(tensor.offset)
        for i in range(0, len(rows), step):
            part = rows[i : i + step]
            data = file.read(len(part) * row_bytes)
            if len(data) != len(part) * row_bytes:
                raise UsageError(f"{path} was truncated while it was read")
            if tensor.kind in KEPT:
                part[:] = np.frombuffer(data, dtype).reshape(part.shape)
            else:
                part[:] = quants.dequantize(np.frombuffer(data, np.uint8).reshape(len(part), -1), tensor.kind)
    return value


def read_factors(path: Path, tensors: Mapping[str, GgufTensor]) -> dict[str, list[float]]:
    """The factors of rotary wavelengths that a file holds as tensors, by name without `.weight`."""
    found = {}
    for name in FACTORS:
        tensor = tensors.get(f"{name}.weight")
        if tensor is not None:
            check_kind(path, name, tensor.kind)
            if len(tensor.shape) != 1 or tensor.shape[0] > 2**15 or tensor.kind != GGMLQuantizationType.F32:
                raise UsageError(f"{path}: {name}.weight must be a list of float32, one for each pair of features")
            found[name] = [float(value) for value in dequantized(path, tensor).tolist()]
    return found
