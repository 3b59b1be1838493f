"""ResonanceRoPE refuses offsets, arrays, angles and frequencies that are wrong or do not fit."""

from __future__ import annotations

from mlx_resonance import ResonanceRoPE
from mlx_resonance.errors import UsageError

import mlx.core as mx
import numpy as np
import pytest

from .rotations import MAX_POSITION, YARN


@pytest.mark.parametrize(
    "offset",
    [-1, MAX_POSITION, 2**40, 1.5, 3.0, mx.array(1.5), mx.array([True]), mx.array([[1]])],
    ids=["negative", "too far", "much too far", "1.5", "3.0", "float array", "bool array", "2-D"],
)
def test_offsets_that_are_refused(offset):
    rope = ResonanceRoPE(YARN)
    x = mx.zeros((1, 1, 2, 128))
    for call in (lambda: rope(x, offset=offset), lambda: rope.rotate(x, x, offset), lambda: rope.angles(2, offset)):
        with pytest.raises(UsageError, match=r"\[ResonanceRoPE\] offset"):
            call()


def test_the_last_position_is_allowed():
    ResonanceRoPE(YARN).angles(2, MAX_POSITION - 1)
    with pytest.raises(UsageError, match=r"\[ResonanceRoPE\] offset"):
        ResonanceRoPE(YARN).angles(0, MAX_POSITION + 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_offsets_for_another_number_of_rows(batch):
    x = mx.zeros((batch, 1, 2, 128))
    with pytest.raises(UsageError, match="do not fit"):
        ResonanceRoPE(YARN)(x, offset=mx.array([1, 2, 3]))
    with pytest.raises(UsageError, match="do not fit"):
        ResonanceRoPE(YARN).rotate(x, x, mx.array([1, 2, 3]))


@pytest.mark.parametrize(
    "x, message",
    [
        (mx.zeros((1, 1, 2, 126)), "128"),
        (mx.zeros((128,)), "shape"),
        (mx.zeros((1, 1, 2, 128), dtype=mx.int32), "floating"),
    ],
    ids=["too few features", "1-D", "integers"],
)
def test_arrays_that_are_refused(x, message):
    with pytest.raises(UsageError, match=rf"\[ResonanceRoPE\] .*{message}"):
        ResonanceRoPE(YARN)(x)


@pytest.mark.parametrize("shape", [(2, 2, 5, 128), (1, 2, 4, 128), (1, 2, 5, 160), (2, 5, 128)])
def test_keys_that_do_not_fit_the_queries(shape):
    with pytest.raises(UsageError, match=r"\[ResonanceRoPE\] q and k"):
        ResonanceRoPE(YARN).rotate(mx.zeros((1, 4, 5, 128)), mx.zeros(shape))


@pytest.mark.parametrize("length", [1, 4])
def test_angles_of_another_length(length):
    rope = ResonanceRoPE(YARN)
    q = mx.zeros((1, 4, 5, 128))
    with pytest.raises(UsageError, match="do not fit"):
        rope.rotate(q, q, angles=rope.angles(length))


@pytest.mark.parametrize("frequencies", [None, 10000.0, np.array([6.0])])
def test_frequencies_of_another_kind(frequencies):
    with pytest.raises(TypeError, match="RotaryFrequencies"):
        ResonanceRoPE(frequencies)
