"""One tensor of a result against the one that it was made from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from .quantization import AT_ONCE, ROUNDOFF, Settings, dequantize, largest_error, relative


@dataclass
class Comparison:
    """What was found in a tensor, and how far it is from its source.

    Args:
        nan, inf: elements that are so.
        wrong: elements further from the source than rounding or the quantizer can bring them.
        exact: whether all are the very numbers of the source.
        error: the root mean square of the error, over that of the source's values; None where one is not finite.
    """

    nan: int = 0
    inf: int = 0
    wrong: int = 0
    exact: bool = True
    error: float | None = 0.0


def compare(
    parts: list[mx.array],
    settings: Settings | None = None,
    original: mx.array | None = None,
    factor: float = 1.0,
    dtype: mx.Dtype | None = None,
) -> Comparison:
    """Compare a tensor with its source, a few rows at a time.

    Args:
        parts: the tensor; or weight, scales and biases as `settings` quantize.
        settings: of the quantization; None where it is not.
        original: of the same shape; None to look at the tensor alone.
        factor: what the original was multiplied by.
        dtype: what it was cast to before it was quantized; None if it was not.
    """
    found = Comparison(exact=factor == 1)
    rows, *rest = parts[0].shape
    step = max(1, AT_ONCE // max(1, math.prod(rest) * (1 if settings is None else 32 // settings["bits"])))
    error = size = 0.0
    for i in range(0, rows, step):
        chunk = [part[i : i + step] for part in parts]
        value = chunk[0] if settings is None else dequantize(chunk, settings)
        found.nan += int(mx.sum(mx.isnan(value)).item())  # type: ignore[arg-type]
        found.inf += int(mx.sum(mx.isinf(value)).item())  # type: ignore[arg-type]
        if original is None:
            continue
        expected = original[i : i + step]
        copied = settings is None and factor == 1 and expected.dtype == value.dtype
        if not copied:
            value, expected = value.astype(mx.float32), expected.astype(mx.float32) * factor
        same = (value == expected) | (mx.isnan(value) & mx.isnan(expected))
        if mx.all(same).item():
            size += float(mx.sum(mx.square(expected.astype(mx.float32))).item())  # type: ignore[arg-type]
            continue
        found.exact = False
        difference = mx.where(same, 0, value.astype(mx.float32) - expected.astype(mx.float32))
        bound = mx.zeros_like(difference)
        if not copied:
            cast = chunk[0].dtype if settings is None else dtype or original.dtype
            bound = _bound(value, expected, chunk, settings, cast, factor)
        found.wrong += int(mx.sum(~same & ~(mx.abs(difference) <= bound)).item())  # type: ignore[arg-type]
        error += float(mx.sum(mx.square(difference)).item())  # type: ignore[arg-type]
        size += float(mx.sum(mx.square(expected.astype(mx.float32))).item())  # type: ignore[arg-type]
    found.error = relative(error, size)
    return found


def _bound(
    value: mx.array,
    expected: mx.array,
    parts: list[mx.array],
    settings: Settings | None,
    dtype: mx.Dtype,
    factor: float,
) -> mx.array:
    """How far each element may be from its source."""
    roundoff, smallest = ROUNDOFF[dtype]
    cast = mx.abs(expected) * (roundoff + (2.0**-23 if factor != 1 else 0)) + smallest
    return cast if settings is None else cast + largest_error(value, parts, settings)
