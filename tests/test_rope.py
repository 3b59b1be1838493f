"""ResonanceRoPE: exact phases at every position; in everything else it behaves like nn.RoPE."""

from __future__ import annotations

from mlx_resonance import (
    ResonanceRoPE,
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    yarn_frequencies,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import oracle
from .rotations import MAX_POSITION, PLAIN_YARN, ROTATION, YARN, layouts, normal

FAR = [131071, 1000003, 10000019, MAX_POSITION]
PLAIN = {
    "default": default_frequencies(64),
    "default-1e6": default_frequencies(128, 1e6),
    "linear-4": linear_frequencies(64, 10000, 4),
    "yarn-8": PLAIN_YARN,
    "yarn-32-500000": yarn_frequencies(128, 500000, 32, 8192),
    "llama3": llama3_frequencies(128, 500000, 8, 1, 4, 8192),
}
RESONANT = {f"resonance-{name}": frequencies.resonate() for name, frequencies in PLAIN.items()}
TABLES = PLAIN | RESONANT


def assert_rotated(actual, x, frequencies, positions, traditional=False):
    """Compare with the oracle's rotation of x, shape (..., L, D), by L positions."""
    theta = oracle.angles(positions, frequencies.wavelengths)
    expected = oracle.rotate(x, theta, frequencies.attention_scale, traditional)
    tolerance = ROTATION * frequencies.attention_scale * np.abs(x).max() * 2**0.5
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=tolerance)


# --- exact phases


def phase_error(frequencies, rotated_unit, position):
    """Largest error of cosine and sine, read off the rotated pair (1, 0), relative to the attention scale."""
    pairs = frequencies.dims // 2
    theta = oracle.angles([position], frequencies.wavelengths)[0]
    scale = frequencies.attention_scale
    cos, sin = np.array(rotated_unit).reshape(2, pairs).astype(np.float64)
    return max(np.abs(cos - scale * np.cos(theta)).max(), np.abs(sin - scale * np.sin(theta)).max()) / scale


def unit_pairs(frequencies):
    pairs = frequencies.dims // 2
    return mx.concatenate([mx.ones((1, 1, 1, pairs)), mx.zeros((1, 1, 1, pairs))], axis=-1)


@pytest.mark.parametrize("position", [0, 1, 2, 4095, *FAR])
@pytest.mark.parametrize("table", TABLES)
def test_phases_are_exact(table, position):
    rotated = ResonanceRoPE(TABLES[table])(unit_pairs(TABLES[table]), offset=position)
    assert phase_error(TABLES[table], rotated, position) <= 2.5e-7


@pytest.mark.parametrize("table", RESONANT)
def test_phases_are_exact_around_a_full_turn(table):
    frequencies = RESONANT[table]
    rope = ResonanceRoPE(frequencies)
    for pair, wavelength in enumerate(frequencies.wavelengths):
        for position in (int(wavelength) - 1, int(wavelength)):
            assert phase_error(frequencies, rope(unit_pairs(frequencies), offset=position), position) <= 2.5e-7, pair


@pytest.mark.xfail(
    strict=True, reason="mx.fast.rope multiplies the position by a float32 frequency: why this op exists"
)
@pytest.mark.parametrize("position", FAR)
def test_mlx_phases_are_exact(position):
    frequencies = RotaryFrequencies(YARN.wavelengths)  # the op has no attention scale
    freqs = mx.array(1 / frequencies.inv_freq, dtype=mx.float32)
    rotated = mx.fast.rope(
        unit_pairs(frequencies), frequencies.dims, traditional=False, base=None, scale=1.0, offset=position, freqs=freqs
    )
    assert phase_error(frequencies, rotated, position) <= 2.5e-7


@layouts
@pytest.mark.parametrize("wavelength", [1, 2, 3, 6, 64, 4095, 54410, 2**24 + 1])
@pytest.mark.parametrize("position", [0, 1, 5, 1000003, 2**30])
def test_a_full_turn_later_every_bit_is_the_same(wavelength, position, traditional):
    rope = ResonanceRoPE(RotaryFrequencies(np.array([float(wavelength)]), 1.2), traditional)
    x = mx.array(normal(1, 2, 3, 2))
    here, later = rope(x, offset=position), rope(x, offset=position + wavelength)
    np.testing.assert_array_equal(np.array(here), np.array(later))


def test_a_pair_of_infinite_wavelength_never_turns():
    x = mx.array(normal(1, 1, 3, 2))
    np.testing.assert_array_equal(ResonanceRoPE(RotaryFrequencies(np.array([np.inf])))(x, offset=MAX_POSITION - 2), x)


# --- like nn.RoPE


@layouts
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 16), (2, 3, 1, 16), (1, 1, 5, 16), (3, 5, 16), (2, 2, 3, 5, 16), (2, 3, 5, 24)],
    ids=["4-D", "one token", "one head", "3-D", "5-D", "dims < D"],
)
@pytest.mark.parametrize("offset", [0, 7, "0-d", "(B,)"])
def test_drop_in_for_mlx_nn(shape, traditional, offset):
    offset = {"0-d": mx.array(7), "(B,)": mx.arange(shape[0]) * 11}.get(offset, offset)
    x = mx.array(normal(*shape))
    ours = ResonanceRoPE(default_frequencies(16), traditional)(x, offset=offset)
    theirs = nn.RoPE(16, traditional=traditional)(x, offset=offset)
    assert ours.dtype == theirs.dtype
    # Theirs: angles up to 27 radians in float32, off by up to 1e-6 each, times features up to 4.
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=1e-5)


def test_two_dimensions_are_one_head():
    x = normal(5, 16)
    assert_rotated(
        ResonanceRoPE(default_frequencies(16))(mx.array(x), offset=3), x, default_frequencies(16), range(3, 8)
    )


@layouts
def test_features_past_dims_are_copied(traditional):
    x = normal(2, 3, 5, 24)
    rotated = ResonanceRoPE(default_frequencies(16), traditional)(mx.array(x), offset=3)
    np.testing.assert_array_equal(np.array(rotated)[..., 16:], x[..., 16:])
    assert_rotated(rotated, x, default_frequencies(16), range(3, 8), traditional)


@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32, mx.int8], ids=str)
def test_one_offset_per_row(dtype):
    x = normal(3, 2, 4, 128)
    rotated = ResonanceRoPE(YARN)(mx.array(x), offset=mx.array([0, 5, 99]).astype(dtype))
    for row, offset in enumerate([0, 5, 99]):
        assert_rotated(rotated[row], x[row], YARN, range(offset, offset + 4))


@pytest.mark.parametrize("table", TABLES)
def test_left_padding_gives_negative_positions(table):
    """As in mlx-lm's BatchKVCache, a row with n tokens of padding starts at position -n."""
    frequencies = TABLES[table]
    x = normal(3, 2, 6, frequencies.dims)
    rotated = ResonanceRoPE(frequencies)(mx.array(x), offset=mx.array([-5, -2, 0]))
    for row, offset in enumerate([-5, -2, 0]):
        assert_rotated(rotated[row], x[row], frequencies, range(offset, offset + 6))


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_offsets_of_numpy(kind):
    x = mx.array(normal(1, 1, 2, 128))
    assert mx.array_equal(ResonanceRoPE(YARN)(x, offset=kind(5)), ResonanceRoPE(YARN)(x, offset=5))


def test_far_offsets_per_row():
    x = normal(2, 1, 3, 128)
    rotated = ResonanceRoPE(YARN)(mx.array(x), offset=mx.array([MAX_POSITION - 2, 1000003]))
    assert_rotated(rotated[0], x[0], YARN, range(MAX_POSITION - 2, MAX_POSITION + 1))
    assert_rotated(rotated[1], x[1], YARN, range(1000003, 1000006))


def test_repr():
    assert repr(ResonanceRoPE(YARN)) == "ResonanceRoPE(128, traditional=False, resonant=True, scale=1.20794)"


# --- queries and keys in one call


@layouts
@pytest.mark.parametrize("offset", [0, 1000003, "(B,)"])
def test_rotate_equals_two_calls(traditional, offset):
    offset = mx.array([3, 70000]) if offset == "(B,)" else offset
    rope = ResonanceRoPE(YARN, traditional)
    q, k = mx.array(normal(2, 4, 5, 128)), mx.array(normal(2, 2, 5, 128, seed=1)).astype(mx.float16)
    rotated_q, rotated_k = rope.rotate(q, k, offset)
    assert (rotated_q.dtype, rotated_k.dtype) == (mx.float32, mx.float16)
    assert mx.array_equal(rotated_q, rope(q, offset))
    assert mx.array_equal(rotated_k, rope(k, offset))


@pytest.mark.parametrize("offset", [0, 1000003, "(B,)"])
def test_rotate_with_precomputed_angles(offset):
    offset = mx.array([3, 70000]) if offset == "(B,)" else offset
    rope = ResonanceRoPE(YARN)
    q, k = mx.array(normal(2, 4, 5, 128)), mx.array(normal(2, 2, 5, 128, seed=1))
    for one, other in zip(rope.rotate(q, k, offset), rope.rotate(q, k, angles=rope.angles(5, offset)), strict=True):
        assert mx.array_equal(one, other)


def test_angles_have_one_row_per_offset():
    rope = ResonanceRoPE(YARN)
    for offset, rows in ((3, 1), (mx.array(3), 1), (mx.array([3, 4]), 2)):
        angles = rope.angles(5, offset)
        assert (angles.offset.shape, angles.length) == ((rows,), 5)
        for values in angles.cos_sin():
            assert (values.shape, values.dtype) == ((rows, 1, 5, 64), mx.float32)


# --- types, empty arrays, views


@layouts
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype, traditional):
    rope = ResonanceRoPE(YARN, traditional)
    x = mx.array(normal(2, 3, 5, 160)).astype(dtype)
    rotated = rope(x, offset=1000003)
    assert rotated.dtype == dtype
    assert mx.array_equal(rotated, rope(x.astype(mx.float32), offset=1000003).astype(dtype))
    assert mx.array_equal(rope.rotate(x, x, 1000003)[0], rotated)


@pytest.mark.parametrize("shape", [(2, 3, 0, 128), (0, 3, 5, 128), (2, 0, 5, 128), (0, 128), (2, 3, 0, 160)])
def test_empty(shape):
    rope = ResonanceRoPE(YARN)
    x = mx.zeros(shape, dtype=mx.float16)
    assert (rope(x).shape, rope(x).dtype) == (shape, mx.float16)
    if len(shape) == 4:
        q, k = rope.rotate(x, x)
        assert (q.shape, k.shape) == (shape, shape)


@layouts
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 2, 1, 3), lambda x: x[:, ::2], lambda x: x[..., 16:], lambda x: x[:1, :, :, ::-1]],
    ids=["transposed", "every other head", "offset", "reversed"],
)
def test_views_that_are_not_contiguous(view, traditional):
    rope = ResonanceRoPE(default_frequencies(32), traditional)
    x = view(mx.array(normal(2, 5, 4, 48)))
    np.testing.assert_array_equal(np.array(rope(x, offset=9)), np.array(rope(mx.array(np.array(x)), offset=9)))
    assert_rotated(rope(x, offset=9), np.array(x), default_frequencies(32), range(9, 9 + x.shape[2]), traditional)


# --- frequencies that change with the length


def dynamic(seq_len):
    return dynamic_ntk_frequencies(32, 10000, 2, 64, seq_len)


def longrope(seq_len):
    return longrope_frequencies(32, 10000, [1.0] * 16, [8.0] * 16, 64, factor=8, seq_len=seq_len)


@pytest.mark.parametrize("as_array", [False, True], ids=["int", "array"])
@pytest.mark.parametrize(
    "by_length", [dynamic, longrope, lambda n: dynamic(n).resonate(), lambda n: longrope(n).resonate()]
)
def test_frequencies_by_length(by_length, as_array):
    rope = ResonanceRoPE(by_length)
    x = normal(2, 2, 8, 32)
    for offset in (0, 56, 57, 200, 0):  # 64 tokens, 65, 208, and a new sequence
        rotated = rope(mx.array(x), offset=mx.array([0, offset]) if as_array else offset)
        assert rope.frequencies == by_length(offset + 8)
        assert_rotated(rotated[1], x[1], by_length(offset + 8), range(offset, offset + 8))
    assert by_length(64) == by_length(1) != by_length(208)


# --- any shape, any offset


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 4),
    pairs=st.integers(1, 4),
    unrotated=st.integers(0, 3),
    traditional=st.booleans(),
    base=st.floats(1.5, 1e7),
    resonant=st.booleans(),
    scale=st.floats(0.5, 2.0),
    data=st.data(),
)
def test_any_rotation(batch, heads, length, pairs, unrotated, traditional, base, resonant, scale, data):
    frequencies = RotaryFrequencies(default_frequencies(2 * pairs, base).wavelengths, scale)
    frequencies = frequencies.resonate() if resonant else frequencies
    last = MAX_POSITION + 1 - length
    offsets = data.draw(st.lists(st.integers(0, last), min_size=batch, max_size=batch))
    x = normal(batch, heads, length, 2 * pairs + unrotated)

    rotated = ResonanceRoPE(frequencies, traditional)(mx.array(x), offset=mx.array(offsets))

    for row, offset in enumerate(offsets):
        assert_rotated(rotated[row], x[row], frequencies, range(offset, offset + length), traditional)
    np.testing.assert_array_equal(np.array(rotated)[..., 2 * pairs :], x[..., 2 * pairs :])
    norm = np.linalg.norm(np.array(rotated)[..., : 2 * pairs], axis=-1)
    np.testing.assert_allclose(norm, scale * np.linalg.norm(x[..., : 2 * pairs], axis=-1), rtol=1e-6)
