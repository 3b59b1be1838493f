"""The rotary kernel's own source against the float64 oracle: in the emulator on Linux, on a GPU where there is one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mlx_resonance import RotaryFrequencies, default_frequencies
from mlx_resonance.kernels import kernel, ops

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .. import oracle
from ..rotations import MAX_POSITION, PLAIN_YARN, layouts, normal
from . import emulator
from .checks import DTYPES, NO_COMPILER, TABLES, Run, check, dtypes, heads, offsets
from .emulator import Strided

pytestmark = pytest.mark.usefixtures("eight_heads_per_thread")


def on_gpu(backend: str) -> Run:
    def run(xs: list[Strided], offset: np.ndarray, *call: object) -> list[np.ndarray]:
        rotated = kernel.launch(backend, [x.mlx() for x in xs], mx.array(offset), *call)
        return [np.array(x.astype(mx.float32), dtype=np.float64) for x in rotated]

    return run


@pytest.fixture(
    scope="module",
    params=["emulator", pytest.param("metal", marks=pytest.mark.metal), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def run(request: pytest.FixtureRequest) -> Run:
    """The kernel: `run(xs, offset, constants, traditional, backward)` gives float64 arrays."""
    if request.param == "emulator":
        if emulator.COMPILER is None:
            pytest.skip(NO_COMPILER)
        return emulator.run
    return on_gpu(request.param)


# --- exact phases

WAVELENGTHS = [1, 2, 3, 4, 6, 64, 4095, 54410, 2**24 + 1, 2**31 - 1, 2**32 - 1, 2**32, 2**40, 2 * np.pi, 1e3 / 7, 1e12]
POSITIONS = [0, 1, 2, 63, 64, 4095, 131_071, 1_000_003, 10_000_019, 2**30, MAX_POSITION, -1, -64, -MAX_POSITION]


def unit_pairs(pairs: int, length: int) -> Strided:
    """(1, 0) in every pair: rotated, it holds cosines and sines."""
    return Strided.of(np.repeat(np.array([1, 0], np.float32), pairs).reshape(1, 1, 1, -1).repeat(length, axis=2))


@pytest.mark.parametrize("position", POSITIONS)
def test_phases_are_exact(run: Run, position: int) -> None:
    frequencies = RotaryFrequencies(np.array([*WAVELENGTHS, np.inf], dtype=np.float64), 1.25)
    constants, unit = ops.phase_constants(frequencies), unit_pairs(len(frequencies.wavelengths), 1)
    rotated = run([unit], offsets(position), constants, False, False)[0].reshape(2, -1)
    theta = oracle.angles([position], frequencies.wavelengths)[0]
    assert np.abs(rotated - 1.25 * np.array([np.cos(theta), np.sin(theta)])).max() <= 2.5e-7 * 1.25


def test_phases_are_exact_all_around_the_circle(run: Run) -> None:
    frequencies = RotaryFrequencies(np.array([99_991.0, 3e5 / 7]))
    positions = 100_000
    rotated = run([unit_pairs(2, positions)], offsets(0), ops.phase_constants(frequencies), False, False)[0]
    theta = oracle.angles(range(positions), frequencies.wavelengths)
    assert np.abs(rotated[0, 0] - np.concatenate([np.cos(theta), np.sin(theta)], -1)).max() <= 1.2e-7


@pytest.mark.parametrize("wavelength", [1, 3, 6, 64, 4095, 99_991, 2**24 + 1])
def test_full_turns_later_every_bit_is_the_same(run: Run, wavelength: int) -> None:
    """Up to the last position, where turns per token alone would no longer give the same bits."""
    length = 5000
    far = (MAX_POSITION - length) // wavelength * wavelength
    constants = ops.phase_constants(RotaryFrequencies(np.array([float(wavelength)])))
    same = Strided.of(np.broadcast_to(normal(1, 1, 1, 2), (3, 1, length, 2)))
    here, later, before = run([same], offsets(0, far, -far), constants, False, False)[0]
    np.testing.assert_array_equal(here, later)
    np.testing.assert_array_equal(here, before)


def test_a_phase_is_rounded_to_the_nearest(run: Run) -> None:
    """A wavelength of 3e9 tokens: the first positions are 1.4 units of 2⁻³² turns apart, and sines show whole units."""
    frequencies, length = RotaryFrequencies(np.array([3e9])), 1000
    rotated = run([unit_pairs(1, length)], offsets(0), ops.phase_constants(frequencies), False, False)[0]
    units = np.array([round(Fraction(2**32 * m, 3 * 10**9)) for m in range(length)])
    np.testing.assert_allclose(rotated[0, 0, :, 1], 2 * np.pi * units / 2**32, rtol=1e-6, atol=0)


# --- heads, layouts, types


@layouts
@dtypes
@pytest.mark.parametrize("length", [1, 7, 300, pytest.param(2048, marks=pytest.mark.long)])
@pytest.mark.parametrize("counts", [(1, 1), (8, 8), (32, 8), (9, 3)], ids=str)
def test_heads_and_lengths(
    run: Run, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, counts: tuple[int, int], length: int, traditional: bool
) -> None:
    """300 tokens are 18 blocks of threads and three quarters of one; 2048, a whole step of prefill, are 128 blocks.

    Up to 32 a thread takes one head.
    """
    monkeypatch.setattr(kernel, "FEW_TOKENS", 32)
    xs = [Strided.of(heads(1, count, length, 128, seed), dtype) for seed, count in enumerate(counts)]
    check(run, xs, offsets(100_000), TABLES["resonance"], traditional)


LAYOUTS = {
    "contiguous": lambda: normal(2, 5, 3, 64),
    "attention's": lambda: heads(2, 5, 3, 64),
    "of a fused projection": lambda: normal(2, 3, 15 * 64).reshape(2, 3, 15, 64).transpose(0, 2, 1, 3)[:, 5:10],
    "features reversed": lambda: normal(2, 5, 3, 64)[..., ::-1],
    "tokens reversed": lambda: normal(2, 5, 3, 64)[:, :, ::-1],
    "heads reversed": lambda: heads(2, 5, 3, 64)[:, ::-1],
    "every other head": lambda: normal(2, 10, 3, 64)[:, ::2],
    "every other feature": lambda: normal(2, 5, 3, 128)[..., ::2],
    "features outermost": lambda: normal(64, 3, 5, 2).transpose(3, 2, 1, 0),
    "one feature off": lambda: normal(2, 5, 3, 65)[..., 1:],
    "two features off": lambda: normal(2, 5, 3, 66)[..., 2:],
    "starts at an odd element": lambda: normal(1 + 2 * 5 * 3 * 64)[1:].reshape(2, 5, 3, 64),
    "one head for all": lambda: np.broadcast_to(normal(2, 1, 3, 64), (2, 5, 3, 64)),
    "one row for all": lambda: np.broadcast_to(normal(1, 5, 3, 64), (2, 5, 3, 64)),
    "one number for all": lambda: np.broadcast_to(normal(1), (2, 5, 3, 64)),
}


@layouts
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_are_read_where_they_lie(run: Run, layout: str, dtype: mx.Dtype, traditional: bool) -> None:
    x, y = LAYOUTS[layout](), heads(2, 2, 3, 64, seed=1)
    frequencies = default_frequencies(64).resonate()
    for xs in ([x, y], [y, x]):
        check(run, [Strided.of(x, dtype) for x in xs], offsets(5, 70_000), frequencies, traditional)


@layouts
@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 5, 8, 31])
@pytest.mark.parametrize("unrotated", [0, 1, 8, 9, 40])
def test_any_number_of_pairs_and_features(run: Run, pairs: int, unrotated: int, traditional: bool) -> None:
    xs = [Strided.of(heads(2, count, 3, 2 * pairs + unrotated, count)) for count in (9, 2)]
    check(run, xs, offsets(0, 12), default_frequencies(2 * pairs).resonate(), traditional)


@layouts
@dtypes
def test_one_run_on_the_packs_and_one_off_them(run: Run, dtype: mx.Dtype, traditional: bool) -> None:
    """The second token has its pairs in elements 11 to 15, off the packs of 4, and 16 to 20, on them."""
    xs = [Strided.of(normal(2, count, 4, 11, seed=count), dtype) for count in (9, 2)]
    check(run, xs, offsets(0, 12), default_frequencies(10).resonate(), traditional)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "values",
    [[0], [100_000], [3, 0, 70_000], [-5, -1, 4], [MAX_POSITION - 4, 2**30, -MAX_POSITION], list(range(20))],
    ids=str,
)
def test_one_offset_or_one_per_row(run: Run, table: str, values: list[int]) -> None:
    batch = max(len(values), 3)
    xs = [Strided.of(heads(batch, count, 5, 128, count)) for count in (4, 1)]
    check(run, xs, offsets(*values), TABLES[table])


@layouts
@pytest.mark.parametrize("rows, length", [(3, 5), (1, 5), (2, 1), (1, 40)])
def test_a_position_for_every_token(run: Run, rows: int, length: int, traditional: bool) -> None:
    """In any order, negative ones too, in any layout; of every row, or one row of positions for all."""
    positions = np.random.default_rng(length).integers(-MAX_POSITION, MAX_POSITION, (rows, length), dtype=np.int32)
    positions[0, 0] = -1
    xs = [Strided.of(heads(max(rows, 2), count, length, 128, count)) for count in (4, 1)]
    for laid_out in (positions, np.asfortranarray(positions)):
        check(run, xs, laid_out, TABLES["resonance"], traditional)


@layouts
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_dtype", DTYPES, ids=str)
def test_types_of_queries_and_keys_may_differ(
    run: Run, q_dtype: mx.Dtype, k_dtype: mx.Dtype, traditional: bool
) -> None:
    xs = [Strided.of(heads(1, 3, 4, 128), q_dtype), Strided.of(heads(1, 2, 4, 128, 1), k_dtype)]
    check(run, xs, offsets(9), PLAIN_YARN, traditional)


@layouts
@dtypes
def test_backward_is_the_transpose(run: Run, dtype: mx.Dtype, traditional: bool) -> None:
    xs = [Strided.of(heads(2, count, 4, 144, count), dtype) for count in (3, 1)]
    check(run, xs, offsets(1_000_003), PLAIN_YARN, traditional, backward=True)


@layouts
@pytest.mark.parametrize("count", [1, 8, 11])
def test_one_array_alone(run: Run, count: int, traditional: bool) -> None:
    check(run, [Strided.of(heads(2, count, 4, 144))], offsets(3, 8), PLAIN_YARN, traditional)


# --- any call


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An array of this shape in any layout: axes in any order, with gaps, reversed or repeated, starting anywhere."""
    order = draw(st.permutations(range(4)))
    steps = [draw(st.sampled_from([1, 1, 1, -1, 2, 3, 0])) for _ in shape]
    sizes = [1 if step == 0 else (size - 1) * abs(step) + 1 for size, step in zip(shape, steps, strict=True)]
    gap = draw(st.integers(0, 4))
    memory = normal(int(np.prod(sizes)) + gap, seed=seed)[gap:]
    x = memory.reshape([sizes[axis] for axis in order]).transpose(np.argsort(order))
    x = x[tuple(slice(None, None, step or 1) for step in steps)]
    return np.broadcast_to(x, shape)


any_call = given(
    batch=st.integers(1, 9),
    length=st.integers(1, 5),
    counts=st.tuples(st.integers(1, 18), st.integers(1, 9)),
    pairs=st.integers(1, 12),
    unrotated=st.integers(0, 20),
    traditional=st.booleans(),
    backward=st.booleans(),
    resonant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    few_tokens=st.sampled_from([0, 32]),
    data=st.data(),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@any_call
def test_any_call(run: Run, **call: Any) -> None:
    check_call(run, **call)


@pytest.mark.long
@settings(max_examples=3000, deadline=None, database=None)
@any_call
def test_calls_that_differ_every_time(run: Run, **call: Any) -> None:
    check_call(run, **call)


def check_call(
    run: Run,
    batch: int,
    length: int,
    counts: tuple[int, int],
    pairs: int,
    unrotated: int,
    traditional: bool,
    backward: bool,
    resonant: bool,
    dtype: mx.Dtype,
    few_tokens: int,
    data: st.DataObject,
) -> None:
    frequencies = RotaryFrequencies(default_frequencies(2 * pairs, 5e5).wavelengths, 1.1)
    frequencies = frequencies.resonate() if resonant else frequencies
    shapes = [(batch, count, length, 2 * pairs + unrotated) for count in counts]
    xs = [Strided.of(data.draw(views(shape, seed)), dtype) for seed, shape in enumerate(shapes)]
    rows = data.draw(st.sampled_from([1, batch]))
    position = st.integers(-MAX_POSITION, MAX_POSITION + 1 - length)
    values = data.draw(st.lists(position, min_size=rows, max_size=rows))
    if all(np.prod(x.shape) >= kernel.SMALL for x in xs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "FEW_TOKENS", few_tokens)
            check(run, xs, offsets(*values), frequencies, traditional, backward)
