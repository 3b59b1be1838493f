"""Weights in 8-bit floating point with scales, as their authors trained or released them: back to 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.files import TensorInfo

import mlx.core as mx

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")  # those of their weights that are E4M3
SCALES = ("_scale_inv", "_scale")  # after the name of the weight
ACTIVATIONS = (".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
AT_ONCE = 2**22  # elements that are in float32 at once


@dataclass(frozen=True)
class Scale:
    """How one weight is scaled.

    Args:
        name: of the tensor of scales.
        block: rows and columns of the weight that share a scale.
        dtype: safetensors' name of the type to make.
    """

    name: str
    block: tuple[int, int]
    dtype: str

    def dequantize(self, weight: mx.array, scale: mx.array) -> mx.array:
        """weight (out, in) as bytes, times its scales, rounded once."""
        rows, columns = self.block
        dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[self.dtype]
        scale = scale.astype(mx.float32)
        scale = mx.broadcast_to(scale, (weight.shape[0], 1)) if scale.size == 1 else scale
        scale = scale.reshape(-(-weight.shape[0] // rows), -1)
        step = max(1, AT_ONCE // (rows * weight.shape[1]))  # rows of scales
        parts = []
        for i in range(0, scale.shape[0], step):
            part = mx.from_fp8(weight[i * rows : (i + step) * rows], mx.float32)
            factors = mx.repeat(scale[i : i + step], min(rows, part.shape[0]), axis=0)[: part.shape[0]]
            factors = mx.repeat(factors, columns, axis=1)[:, : part.shape[1]] if factors.shape[1] > 1 else factors
            parts.append((part * factors).astype(dtype))
            mx.eval(parts[-1])
        return mx.concatenate(parts)


Scales = dict[str, Scale]


def scales(
    quantization: Any, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], originals: list[str]
) -> Scales:
    """The scale of each weight that is an 8-bit float, by the weight's name.

    Args:
        quantization: `quantization_config` of config.json.
        config: the whole object.
        tensors: of the checkpoint.
        originals: what its card names as the model before quantization.

    Raises:
        UsageError: another kind of quantization, or scales that do not fit.
    """
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else f"{quantization!r:.40}"
    original = f", {' or '.join(originals)}" if originals else ""
    block = _block(method, quantization) if method in METHODS else ()
    if block == ():
        raise UsageError(f"the weights are quantized with {method}, which is not read: convert the original{original}")
    dtype = {"float16": "F16", "float32": "F32"}.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    found: Scales = {}
    for name, info in tensors.items():
        if info.dtype == "F8_E4M3":
            scale = next((name + suffix for suffix in SCALES if name + suffix in tensors), None)
            if scale is None or len(info.shape) != 2:
                raise UsageError(f"{name} is an 8-bit float without a scale: convert the original{original}")
            found[name] = Scale(scale, _fit(name, info, tensors[scale], block), dtype)
    return found


def _block(method: str, quantization: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows and columns of a block; None for a scale per row or tensor; empty where it is not an 8-bit float."""
    block = quantization.get("weight_block_size")
    if method == "compressed-tensors":
        groups = quantization.get("config_groups")
        all_groups = list(groups.values()) if isinstance(groups, Mapping) else []
        found = [group.get("weights") if isinstance(group, Mapping) else None for group in all_groups]
        weights: list[Mapping[str, Any]] = [entry for entry in found if isinstance(entry, Mapping)]
        if not weights or len(weights) < len(all_groups):
            return ()
        if any(entry.get("type") != "float" or entry.get("num_bits") != 8 for entry in weights):
            return ()
        block = weights[0].get("block_structure") if weights[0].get("strategy") == "block" else None
        if len({str(w.get("block_structure")) for w in weights}) > 1:
            return ()
    if block is None:
        return None
    right = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    return tuple(block) if right else ()


def _fit(name: str, weight: TensorInfo, scale: TensorInfo, block: tuple[int, ...] | None) -> tuple[int, int]:
    """The block of a weight that shares a scale. Raises UsageError where the scales have another shape or type."""
    rows, columns = weight.shape
    if scale.dtype in ("F32", "F16", "BF16"):
        if math.prod(scale.shape) == 1:
            return 1, columns
        if block is not None and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block[0], block[1]
        if block is None and scale.shape in ((rows,), (rows, 1)):
            return 1, columns
    raise UsageError(
        f"{name} of shape {weight.shape} has scales of type {scale.dtype} and shape {scale.shape}: "
        f"expected one, one per row, or one per block of weight_block_size = {block}"
    )
