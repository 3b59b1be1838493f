"""Shared by the kernel tests: arrays and types, and the check of a call against the oracle and the twin."""

from __future__ import annotations

from collections.abc import Callable

from mlx_resonance import RotaryFrequencies
from mlx_resonance.kernels import ops

import mlx.core as mx
import numpy as np
import pytest

from .. import oracle
from ..rotations import PLAIN_YARN, ROTATION, YARN, normal
from .emulator import Strided

TABLES = {"yarn": PLAIN_YARN, "resonance": YARN}
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Half the distance between neighbouring numbers, relative to the smaller one: the final rounding.
ROUNDING = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
SUBNORMAL = {mx.float32: 0.0, mx.float16: 2.0**-25, mx.bfloat16: 0.0}
NO_COMPILER = "running the Metal source needs GCC on Linux"

Run = Callable[..., list[np.ndarray]]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("mlx.core."))


def heads(batch: int, count: int, length: int, dims: int, seed: int = 0) -> np.ndarray:
    """(B, H, L, D), laid out as attention makes it from a projection."""
    return normal(batch, length, count * dims, seed=seed).reshape(batch, length, count, dims).transpose(0, 2, 1, 3)


def offsets(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def check(
    run: Run,
    xs: list[Strided],
    offset: np.ndarray,
    frequencies: RotaryFrequencies,
    traditional: bool = False,
    backward: bool = False,
) -> list[np.ndarray]:
    """Run the kernel; compare the result with the oracle and with the twin in plain mlx.core."""
    constants = ops.phase_constants(frequencies)
    rotated = run(xs, offset, constants, traditional, backward)
    length = xs[0].shape[2]
    cos, sin = ops.cos_sin(mx.array(offset), length, constants)
    twins = ops.rotate([x.mlx() for x in xs], cos, -sin if backward else sin, traditional)
    sign = -1 if backward else 1
    positions = offset if offset.ndim == 2 else offset[:, None] + np.arange(length)
    theta = np.stack([oracle.angles(of_row, frequencies.wavelengths) for of_row in positions.tolist()])
    for x, y, twin in zip(xs, rotated, twins, strict=True):
        values = x.values()
        assert y.shape == x.shape, y.shape
        expected = oracle.rotate(values, sign * theta[:, None], frequencies.attention_scale, traditional)
        rotation = ROTATION * frequencies.attention_scale * np.abs(values).max(initial=0) * 2**0.5
        tolerance = rotation + SUBNORMAL[x.dtype] + ROUNDING[x.dtype] * (np.abs(expected) + rotation)
        assert np.all(np.abs(y - expected) <= tolerance), np.abs(y - expected).max()
        # At most two roundings apart: the two float32 results may fall on either side of a tie.
        apart = np.abs(y - np.array(twin.astype(mx.float32)))
        assert np.all(apart <= 2 * tolerance), apart.max()
        np.testing.assert_array_equal(y[..., frequencies.dims :], values[..., frequencies.dims :])
    return rotated
