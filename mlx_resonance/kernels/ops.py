"""The rotary op in plain mlx.core: exact integer phases, their cosine and sine, the rotation.

A phase is a 32-bit fraction of a turn, in units of 2⁻³² turns. No angle above π/4 ever reaches floating point.
"""

from __future__ import annotations

import math
from fractions import Fraction

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def phase_constants(wavelengths: NDArray[np.float64]) -> tuple[mx.array, mx.array]:
    """What the phase of a position is computed from, for every pair.

    Args:
        wavelengths: tokens per turn, float64, shape (P,).

    Returns:
        modulus: int64, shape (P,): the wavelength where it is a whole number (below 2⁶²), else 0.
        turns: uint64, shape (P,): turns per token in units of 2⁻⁶⁴, rounded from the exact quotient.
    """
    modulus, turns = [], []
    for wavelength in wavelengths.tolist():
        finite = math.isfinite(wavelength)
        modulus.append(int(wavelength) if wavelength < 2**62 and wavelength.is_integer() else 0)
        turns.append(round(2**64 / Fraction(wavelength)) % 2**64 if finite else 0)
    return mx.array(np.array(modulus, dtype=np.int64)), mx.array(np.array(turns, dtype=np.uint64))


@mx.compile
def cos_sin(
    positions: mx.array, modulus: mx.array, turns: mx.array, attention_scale: mx.array
) -> tuple[mx.array, mx.array]:
    """Cosine and sine of every pair's angle at every position, times the attention scale.

    For a whole-number wavelength λ the position is first reduced to m mod λ, so m and m + λ give the same bits. The
    64-bit product with the turns per token wraps around at whole turns, which is what an angle does.

    Args:
        positions: integer array, shape (..., L), values in (-2³¹, 2³¹).
        modulus, turns: from `phase_constants`, shape (P,).
        attention_scale: float32, shape ().

    Returns:
        cos, sin: float32, shape (..., L, P), within 2.5e-7 × attention_scale of the exact values.
    """
    positions = positions[..., None].astype(mx.int64)
    reduced = mx.where(modulus > 0, mx.remainder(positions, mx.maximum(modulus, 1)), positions)
    phase64 = reduced.astype(mx.uint64) * turns
    half = mx.array(1 << 31, dtype=mx.uint64)
    phase = mx.right_shift(phase64 + half, mx.array(32, dtype=mx.uint64)).astype(mx.uint32)

    # phase = quadrant · 2³⁰ + rest, rest in [-2²⁹, 2²⁹): at most an eighth of a turn from a quarter of the circle.
    shift, eighth = mx.array(30, dtype=mx.uint32), mx.array(1 << 29, dtype=mx.uint32)
    quadrant = mx.right_shift(phase + eighth, shift)
    rest = (phase - mx.left_shift(quadrant, shift)).view(mx.int32)
    cos, sin = _cos_sin_of_an_eighth(rest.astype(mx.float32) * (2 * math.pi / 2**32))
    odd = (quadrant & 1) == 1
    signed_cos = mx.where((quadrant == 1) | (quadrant == 2), -attention_scale, attention_scale)
    signed_sin = mx.where(quadrant >= 2, -attention_scale, attention_scale)
    return mx.where(odd, sin, cos) * signed_cos, mx.where(odd, cos, sin) * signed_sin


def _cos_sin_of_an_eighth(angle: mx.array) -> tuple[mx.array, mx.array]:
    """Taylor's series for |angle| <= π/4, cut below 1e-8; on a CPU ten times as fast as mx.cos and mx.sin."""
    z = angle * angle
    sin = angle - angle * z * (1 / 6 - z * (1 / 120 - z * (1 / 5040 - z / 362880)))
    cos = 1 - z * (1 / 2 - z * (1 / 24 - z * (1 / 720 - z * (1 / 40320 - z / 3628800))))
    return cos, sin


def _rotate(x: mx.array, cos: mx.array, sin: mx.array, traditional: bool) -> mx.array:
    """Rotate the first 2·P features of x, shape (B, H, L, D); cos and sin (B or 1, 1, L, P), float32."""
    pairs = cos.shape[-1]
    dims = 2 * pairs
    # The two members of a pair along an axis of their own, of length 2: the other member is that axis reversed.
    shape, axis = ((pairs, 2), -1) if traditional else ((2, pairs), -2)
    cos, sin = mx.expand_dims(cos, axis), mx.expand_dims(sin, axis)
    cos, sin = mx.concatenate([cos, cos], axis), mx.concatenate([-sin, sin], axis)
    rotated = x[..., :dims].reshape(*x.shape[:-1], *shape).astype(mx.float32)
    swapped = rotated[..., ::-1] if traditional else rotated[..., ::-1, :]
    rotated = (rotated * cos + swapped * sin).reshape(*x.shape[:-1], dims).astype(x.dtype)
    return rotated if dims == x.shape[-1] else mx.concatenate([rotated, x[..., dims:]], -1)


@mx.compile
def rotate(q: mx.array, k: mx.array, cos: mx.array, sin: mx.array, traditional: bool) -> tuple[mx.array, mx.array]:
    """Rotate queries and keys by the same angles, in float32, rounding once at the end.

    Args:
        q: queries, shape (B, H, L, D), any floating type.
        k: keys, shape (B, H_kv, L, D).
        cos, sin: from `cos_sin`, shape (B or 1, 1, L, P) with 2·P <= D; features from 2·P on are copied.
        traditional: pairs are neighbours (2i, 2i + 1) instead of (i, i + P).

    Returns:
        q and k rotated, shapes and types as they came.
    """
    return _rotate(q, cos, sin, traditional), _rotate(k, cos, sin, traditional)


@mx.compile
def rotate_one(x: mx.array, cos: mx.array, sin: mx.array, traditional: bool) -> mx.array:
    """`rotate` for a single array, shape (B, H, L, D)."""
    return _rotate(x, cos, sin, traditional)
