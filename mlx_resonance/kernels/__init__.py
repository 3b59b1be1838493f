"""The rotary op: `rotate` picks the kernel on a GPU (gpu.py) or its twin in plain mlx.core (ops.py)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from . import gpu, ops, trial
from .ops import PhaseConstants, phase_constants

__all__ = ["Angles", "PhaseConstants", "angles", "phase_constants", "rotate"]


class Angles(NamedTuple):
    """The angles of one step, to be shared by all layers.

    Attributes:
        offset: position of the first token, int32, shape (1,) or (B,); or of every token, shape (B, L).
        length: number of tokens, L.
        constants: of the frequencies.
        table: `cos_sin` computed once; None where the kernel computes them as it goes.
        bare: launches of the kernel for a step that MLX will not transform; else None.
    """

    offset: mx.array
    length: int
    constants: PhaseConstants
    table: tuple[mx.array, mx.array] | None
    bare: gpu.BareLaunches | None = None

    def cos_sin(self, like: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Cosine and sine times the attention scale, float32, shape (1, 1, L, P) or (B, 1, L, P)."""
        return self.table or ops.cos_sin(self.offset, self.length, self.constants, like)


def angles(
    offset: mx.array, length: int, constants: PhaseConstants, like: mx.array | None = None, transformable: bool = True
) -> Angles:
    """The angles of one step: see `Angles`; arguments as in `ops.cos_sin` and `ResonanceRoPE.angles`."""
    if trial.current_backend():
        return Angles(offset, length, constants, None, None if transformable else gpu.BareLaunches())
    return Angles(offset, length, constants, ops.cos_sin(offset, length, constants, like))


def rotate(xs: list[mx.array], angles: Angles, traditional: bool) -> list[mx.array]:
    """Rotate one array or two, by the same angles.

    Args:
        xs: shape (B, H, L, D) each, H their own.
        angles: of 2·P <= D features; those from 2·P on are copied.
        traditional: pairs are neighbours (2i, 2i + 1) instead of (i, i + P).

    Returns:
        The arrays rotated, shapes and types as they came.
    """
    backend = trial.current_backend()
    if backend and trial.can_rotate(backend, xs, angles.offset, angles.constants, traditional):
        if angles.bare is not None and len(xs) == 2:
            return angles.bare.prepare(backend, xs, angles.offset, angles.constants, traditional)
        return gpu.rotate(backend, xs, angles.offset, angles.constants, traditional)
    return ops.rotate(xs, *angles.cos_sin(xs[0]), traditional)
