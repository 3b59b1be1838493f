"""The rotary op in plain mlx.core, the twin of the kernel: exact integer phases, their cosine and sine, the rotation.

A phase is a 32-bit fraction of a turn, in units of 2⁻³² turns. No angle above π/4 ever reaches floating point.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..frequencies import RotaryFrequencies


class PhaseConstants(NamedTuple):
    """What the phase of a position is computed from, P pairs.

    Attributes:
        modulus: uint32, shape (P,): the wavelength where it is a whole number below 2³², else 0.
        turns: uint64, shape (P,): turns per token in units of 2⁻⁶⁴, rounded from the exact quotient.
        attention_scale: float32, shape (1,).
        packed: uint64, shape (2·P + 1,): modulus, turns, the bits of attention_scale. What the kernel reads, since
            every input of a launch takes time.
    """

    modulus: mx.array
    turns: mx.array
    attention_scale: mx.array
    packed: mx.array


def phase_constants(frequencies: RotaryFrequencies) -> PhaseConstants:
    """The constants of some frequencies.

    A whole-number wavelength of 2³² or more needs no modulus: no position reaches it.
    """
    modulus, turns = [], []
    for wavelength in frequencies.wavelengths.tolist():
        modulus.append(int(wavelength) if wavelength < 2**32 and wavelength.is_integer() else 0)
        turns.append(round(2**64 / Fraction(wavelength)) % 2**64 if math.isfinite(wavelength) else 0)
    of_pairs = np.array(modulus, np.uint32), np.array(turns, np.uint64)
    scale = np.array([frequencies.attention_scale], np.float32)
    packed = np.concatenate([*of_pairs, scale.view(np.uint32)], dtype=np.uint64)
    return PhaseConstants(*(mx.array(part) for part in (*of_pairs, scale, packed)))


def cos_sin(
    offset: mx.array, length: int, constants: PhaseConstants, like: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Cosine and sine of every pair's angle at the positions of one step, times the attention scale.

    Args:
        offset: position of the first token, an integer array of shape (N,), or of every token, shape (N, L); positions
            lie in (-2³¹, 2³¹).
        length: number of tokens, L.
        constants: from `phase_constants`.
        like: an array of the same step, such as the queries; not read. Under `mx.export_function`, which cannot write
            what is compiled, it tells MLX that the step is being traced even if the offset is not.

    Returns:
        cos, sin: float32, shape (N, 1, L, P), within 2.5e-7 × attention_scale of the exact values.
    """
    start = offset.astype(mx.int64)
    positions = start[:, None] if offset.ndim == 2 else mx.arange(length, dtype=mx.int64) + start.reshape(-1, 1, 1)
    cos, sin = _cos_sin(positions, *constants[:3], offset if like is None else like)
    return mx.stop_gradient(cos), mx.stop_gradient(sin)


@mx.compile  # which leaves the operations as they are if any argument is being traced, `like` included
def _cos_sin(
    positions: mx.array, modulus: mx.array, turns: mx.array, attention_scale: mx.array, like: mx.array
) -> tuple[mx.array, mx.array]:
    # For a whole-number wavelength λ the position is first reduced to m mod λ, so m and m + λ give the same bits. The
    # 64-bit product with the turns per token wraps around at whole turns, which is what an angle does.
    positions, modulus = positions[..., None], modulus.astype(mx.int64)
    reduced = mx.where(modulus > 0, mx.remainder(positions, mx.maximum(modulus, 1)), positions)
    phase64 = reduced.astype(mx.uint64) * turns
    half = mx.array(1 << 31, dtype=mx.uint64)
    phase = mx.right_shift(phase64 + half, mx.array(32, dtype=mx.uint64)).astype(mx.uint32)

    # phase = quadrant · 2³⁰ + rest, rest in [-2²⁹, 2²⁹): at most an eighth of a turn from a quarter of the circle.
    shift, eighth = mx.array(30, dtype=mx.uint32), mx.array(1 << 29, dtype=mx.uint32)
    quadrant = mx.right_shift(phase + eighth, shift)
    rest = (phase - mx.left_shift(quadrant, shift)).view(mx.int32)
    cos, sin = _cospi_sinpi(rest.astype(mx.float32) * 2**-31)
    odd = (quadrant & 1) == 1
    signed_cos = mx.where((quadrant == 1) | (quadrant == 2), -attention_scale, attention_scale)
    signed_sin = mx.where(quadrant >= 2, -attention_scale, attention_scale)
    return mx.where(odd, sin, cos) * signed_cos, mx.where(odd, cos, sin) * signed_sin


def _cospi_sinpi(x: mx.array) -> tuple[mx.array, mx.array]:
    """cos(πx) and sin(πx) for |x| <= 1/4 by Taylor's series, cut below 1e-8; on a CPU ten times as fast as mx.cos."""
    c = [math.pi**n / math.factorial(n) for n in range(11)]
    z = x * x
    sin = x * (c[1] - z * (c[3] - z * (c[5] - z * (c[7] - z * c[9]))))
    cos = 1 - z * (c[2] - z * (c[4] - z * (c[6] - z * (c[8] - z * c[10]))))
    return cos, sin


@mx.compile
def rotate(xs: list[mx.array], cos: mx.array, sin: mx.array, traditional: bool) -> list[mx.array]:
    """Rotate arrays by the same angles, in float32, rounding once at the end.

    Args:
        xs: shape (B, H, L, D) each, any floating type, H their own.
        cos, sin: from `cos_sin`, shape (B or 1, 1, L, P) with 2·P <= D; features from 2·P on are copied.
        traditional: pairs are neighbours (2i, 2i + 1) instead of (i, i + P).

    Returns:
        The arrays rotated, shapes and types as they came.
    """
    pairs = cos.shape[-1]
    dims = 2 * pairs
    # The two members of a pair along an axis of their own, of length 2: the other member is that axis reversed.
    shape, axis = ((pairs, 2), -1) if traditional else ((2, pairs), -2)
    cos, sin = mx.expand_dims(cos, axis), mx.expand_dims(sin, axis)
    cos, sin = mx.concatenate([cos, cos], axis), mx.concatenate([-sin, sin], axis)
    # (B, H, L, …) is a view of memory in the order of (B, L, H, …), as attention makes it from a projection: computed
    # in that order it is read three times as fast on a CPU.
    cos, sin = cos.swapaxes(1, 2), sin.swapaxes(1, 2)

    def rotated(x: mx.array) -> mx.array:
        x = x.swapaxes(1, 2)
        pair = x[..., :dims].reshape(*x.shape[:-1], *shape).astype(mx.float32)
        swapped = pair[..., ::-1] if traditional else pair[..., ::-1, :]
        y = (pair * cos + swapped * sin).reshape(*x.shape[:-1], dims).astype(x.dtype)
        return (y if dims == x.shape[-1] else mx.concatenate([y, x[..., dims:]], -1)).swapaxes(1, 2)

    return [rotated(x) for x in xs]
