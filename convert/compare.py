"""A tensor of a result against the tensor of its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from .quantization import AT_ONCE, ROUNDOFF, QuantizationArguments, dequantize, largest_error, relative


@dataclass
class Comparison:
    """What was found in a tensor, and its error.

    Args:
        nan, inf: the number of such elements.
        wrong: the number of elements whose error neither rounding nor the quantizer can explain.
        exact: whether all elements equal the source's.
        error: the root mean square of the error, over that of the source's values; None where one is not finite.
    """

    nan: int = 0
    inf: int = 0
    wrong: int = 0
    exact: bool = True
    error: float | None = 0.0


def compare(
    parts: list[mx.array],
    arguments: QuantizationArguments | None = None,
    original: mx.array | None = None,
    factor: float = 1.0,
    dtype: mx.Dtype | None = None,
) -> Comparison:
    """Compare a tensor with its source, a few rows at a time.

    Args:
        parts: the tensor; or weight, scales and biases.
        arguments: of the quantization; None for no quantization.
        original: the source's tensor, of the same shape; None to look at the result's alone.
        factor: what the original was multiplied by.
        dtype: what it was cast to before it was quantized; None for its own type.
    """
    found = Comparison(exact=factor == 1)
    rows, *rest = parts[0].shape
    step = max(1, AT_ONCE // max(1, math.prod(rest) * (1 if arguments is None else 32 // arguments["bits"])))
    error = size = 0.0
    for i in range(0, rows, step):
        chunk = [part[i : i + step] for part in parts]
        value = chunk[0] if arguments is None else dequantize(chunk, arguments)
        found.nan += int(_sum(mx.isnan(value)))
        found.inf += int(_sum(mx.isinf(value)))
        if original is None:
            continue
        expected = original[i : i + step]
        copied = arguments is None and factor == 1 and expected.dtype == value.dtype
        if not copied:
            value, expected = value.astype(mx.float32), expected.astype(mx.float32) * factor
        size += _sum(mx.square(expected.astype(mx.float32)))
        same = (value == expected) | (mx.isnan(value) & mx.isnan(expected))
        if mx.all(same).item():
            continue
        found.exact = False
        difference = mx.where(same, 0, value.astype(mx.float32) - expected.astype(mx.float32))
        bound = mx.zeros_like(difference)
        if not copied:
            roundoff, smallest = ROUNDOFF[chunk[0].dtype if arguments is None else dtype or original.dtype]
            bound = mx.abs(expected) * (roundoff + (2.0**-23 if factor != 1 else 0)) + smallest
        if arguments is not None:
            bound = bound + largest_error(value, chunk, arguments)
        found.wrong += int(_sum(~same & ~(mx.abs(difference) <= bound)))
        error += _sum(mx.square(difference))
    found.error = relative(error, size)
    return found


def _sum(values: mx.array) -> float:
    return float(mx.sum(values).item())  # type: ignore[arg-type]
