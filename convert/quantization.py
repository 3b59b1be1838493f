"""Quantization as mlx-lm decides it for each layer, a few rows at a time; and the largest error it may have."""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from mlx_resonance._mlx_lm import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_resonance.errors import UsageError, check_option
from mlx_resonance.validation import QUANTIZATIONS

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten

MODES = tuple(QUANTIZATIONS)
BITS, GROUP_SIZES = QUANTIZATIONS["affine"]
AT_ONCE = 2**20  # elements; in a 4-bit float MLX on the CPU needs 70 bytes for each
SAMPLE = 4  # the error of a large weight is measured in every 4th row: all rows would take as long as quantizing
PARTS = ("weight", "scales", "biases")
# Half the distance of neighbours around 1, and the error of rounding the smallest numbers or flushing them to 0.
ROUNDOFF = {mx.float32: (2.0**-24, 2.0**-126), mx.float16: (2.0**-11, 2.0**-25), mx.bfloat16: (2.0**-8, 2.0**-126)}

_thread = threading.local()

QuantizationArguments = dict[str, Any]  # group_size, bits, mode: the arguments of mx.quantize


def check_arguments(quantize: bool, bits: int | None, group_size: int | None, mode: str, recipe: str | None) -> None:
    """Raise UsageError where they contradict each other, or mlx-lm has no such value."""
    given = {"q_bits": bits, "q_group_size": group_size, "quant_predicate": recipe}
    given = {name: value for name, value in given.items() if value is not None}
    check_option("q_mode", mode in MODES, f"one of {', '.join(MODES)}", mode)
    if not quantize:
        for name, value in (given | ({} if mode == "affine" else {"q_mode": mode})).items():
            raise UsageError(f"{name} = {value} is a setting of quantization", remedies=[{"quantize": True}])
    if mode != "affine":
        for name, value in given.items():
            raise UsageError(f"{name} = {value}: q_mode {mode} has its own, leave it out", option=name)
    for name, allowed in (("q_bits", BITS), ("q_group_size", GROUP_SIZES), ("quant_predicate", QUANT_RECIPES)):
        right = name not in given or given[name] in allowed
        check_option(name, right, f"one of {', '.join(map(str, allowed))}", given.get(name))


def decide(
    model: nn.Module, config: dict[str, Any], bits: int | None, group_size: int | None, mode: str, recipe: str | None
) -> tuple[dict[str, QuantizationArguments], dict[str, Any]]:
    """Have mlx-lm decide which layers of a model without weights, which it changes, are quantized, and how.

    Returns:
        Arguments by the name of the weight, and the config with the key `quantization`.

    Raises:
        UsageError: no layer can be quantized.
    """
    predicate: Callable[..., Any] | None = None
    if recipe is not None:
        predicate = mixed_quant_predicate_builder(recipe, model, group_size or 64)
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints its bits per weight
        result: tuple[nn.Module, dict[str, Any]] = mlx_lm.utils.quantize_model(
            model, config, group_size, bits, mode=mode, quant_predicate=predicate
        )
    arguments = arguments_of(dict(tree_flatten(result[0].parameters())), result[1]["quantization"])
    if not arguments:
        size = result[1]["quantization"]["group_size"]
        raise UsageError(f"no layer's width is a multiple of the group size {size}", option="q_group_size")
    return arguments, result[1]


def arguments_of(names: Iterable[str], quantization: Mapping[str, Any] | None) -> dict[str, QuantizationArguments]:
    """How each quantized weight among some tensors is quantized, by the `quantization` of config.json."""
    quantization = quantization or {}
    common = {key: quantization.get(key, "affine") for key in ("group_size", "bits", "mode")}
    layers = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
    own = {layer: value for layer, value in quantization.items() if isinstance(value, dict)}
    return {f"{layer}.weight": common | own.get(layer, {}) for layer in layers}


def group_parts(names: Iterable[str], quantized: Collection[str]) -> dict[str, list[str]]:
    """The tensors that belong together: weight, scales and biases under the weight's name, any other by itself."""
    groups = {name: [name] for name in names}
    for name in quantized:
        layer = name.removesuffix("weight")
        groups[name] += [layer + part for part in PARTS[1:] if groups.pop(layer + part, None)]
    return groups


def quantize(weight: mx.array, arguments: QuantizationArguments) -> tuple[list[mx.array], float | None]:
    """mx.quantize of a weight (out, in), with little memory and on more than one core.

    Returns:
        Weight, scales and, where the mode is affine, biases; and the root mean square of the error, over that of the
        values, of a large weight from every fourth row; None where one is not finite.
    """
    step = max(1, AT_ONCE // weight.shape[-1])
    parts: list[list[mx.array]] = []
    error = size = 0.0
    streams = _streams()
    sample = SAMPLE if weight.size > AT_ONCE else 1
    for i in range(0, weight.shape[0], step * len(streams)):
        differences, originals = [], []
        for stream, start in zip(streams, range(i, weight.shape[0], step), strict=False):
            with mx.stream(stream):
                rows = weight[start : start + step]
                parts.append(list(mx.quantize(rows, **arguments)))
                originals.append(rows[::sample].astype(mx.float32))
                differences.append(dequantize([part[::sample] for part in parts[-1]], arguments) - originals[-1])
        sums = mx.stack([mx.sum(mx.square(array)) for array in (*differences, *originals)])
        mx.eval(parts[-len(originals) :], sums)
        squares = np.array(sums, np.float64)
        error, size = error + float(squares[: len(originals)].sum()), size + float(squares[len(originals) :].sum())
    joined = [mx.concatenate(list(part)) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
    mx.eval(joined)
    return joined, relative(error, size)


def _streams() -> list[mx.Stream]:
    """On the CPU MLX uses one core for a stream: one stream per core, and each thread has its own."""
    if mx.default_device() == mx.Device(mx.gpu):
        return [mx.default_stream(mx.gpu)]
    if not hasattr(_thread, "streams"):
        _thread.streams = [mx.new_stream(mx.cpu) for _ in range(min(4, os.cpu_count() or 1))]
    streams: list[mx.Stream] = _thread.streams
    return streams


def dequantize(parts: list[mx.array], arguments: QuantizationArguments | None) -> mx.array:
    """A tensor in float32, quantized or not. The scales are widened first: no rounding comes on top."""
    if arguments is None:
        return parts[0].astype(mx.float32)
    weight, scales = parts[:2]
    if arguments["mode"] != "affine":
        return mx.dequantize(weight, scales, **arguments, dtype=mx.float32)
    return mx.dequantize(weight, scales.astype(mx.float32), parts[2].astype(mx.float32), **arguments)


def relative(error: float, size: float) -> float | None:
    """The root of a quotient of sums of squares, to four digits; None where it is not finite."""
    if error == 0:
        return 0.0
    ratio = math.sqrt(error / size) if size > 0 else math.inf
    return float(f"{ratio:.4g}") if math.isfinite(ratio) else None


def largest_error(value: mx.array, parts: list[mx.array], arguments: QuantizationArguments) -> mx.array:
    """The largest error that each element of a dequantized weight may have, if MLX quantized it right.

    `value`, float32, was dequantized from `parts`; the bound has its shape.

    Source: quantize() in MLX's backend/cpu/quantized.cpp, fp_quantize() in its ops.cpp.
    """
    scales, groups = parts[1], value.reshape(*parts[1].shape, -1)
    magnitude = mx.abs(groups)
    if arguments["mode"] == "affine":
        # Half a step inside; the scale is moved so that one end of the group is met, and the other end may lie a step
        # beyond. Scale and bias were rounded after the weights were.
        unit, smallest = ROUNDOFF[scales.dtype]
        steps = 2 ** arguments["bits"]
        step, bias = mx.abs(scales.astype(mx.float32)), mx.abs(parts[2].astype(mx.float32))
        code = mx.abs(groups - parts[2].astype(mx.float32)[..., None]) / step[..., None]
        inside = (code > 0.5) & (code < steps - 1.5)
        rounding = step * steps * unit + bias * unit + (steps + 1) * smallest
        bound = mx.where(inside, 0.5, 1.0) * step[..., None] * (1 + 2 * unit) + rounding[..., None]
        return (1.001 * bound).reshape(value.shape)
    mantissa, smallest, top = {4: (1, 0.5, 6.0), 8: (3, 2.0**-9, 448.0)}[arguments["bits"]]
    # Half the distance to the next number of the format; powers of two as scales cut off up to a factor of 1.47 at the
    # top (log2 is rounded in the type of the weights), E4M3 as scales a sixteenth, or half their smallest number.
    if arguments["mode"] == "nvfp4":
        scale = mx.from_fp8(scales, mx.float32)
        beyond = mx.where(scale >= 448, mx.inf, top * mx.maximum(scale / 15, 2.0**-10))  # 448 is the largest
    else:
        scale = mx.power(2.0, scales.astype(mx.float32) - 127)
        beyond = 0.47 * top * scale
    scale, beyond = scale[..., None], beyond[..., None]
    bound = 1.02 * mx.maximum(magnitude * 2.0 ** -(mantissa + 1), scale * smallest / 2)
    bound = mx.where(magnitude >= top * scale * 0.999, mx.maximum(bound, 1.02 * beyond), bound)
    return bound.reshape(value.shape)
