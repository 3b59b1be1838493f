"""Position maps: the positions of the papers, and attention by them against a dense oracle in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from mlx_resonance import ResonanceRoPE, RopeConfig, attend
from mlx_resonance.errors import UsageError
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.plain_cache import PlainCache
from mlx_resonance.generation.quantized_cache import QuantizedCache
from mlx_resonance.positions import METHODS, PositionMap, position_map
from mlx_resonance.rope_types import LONGEST

import mlx.core as mx
import numpy as np
import pytest

from . import oracle
from .random_models import random_rope

LENGTHS = ((64, 150), (20, 97), (9, 60), (2, 12), (31, 33))


def random_map(draw: np.random.Generator, trained: int) -> PositionMap:
    """Any map for a trained length, its window and group at their bounds as well."""
    method = METHODS[draw.integers(len(METHODS))]
    window = int(draw.choice([1, trained - 1, draw.integers(1, trained)]))
    return PositionMap(method, trained, window, int(draw.integers(1, 20)) if method == "self-extend" else None)


@pytest.mark.parametrize("seed", range(30))
def test_every_pair_of_tokens_is_where_the_papers_put_it(seed: int) -> None:
    """Each key is seen exactly once, at the positions of the oracle, however the queries are cut."""
    draw = np.random.default_rng(seed)
    trained, length = LENGTHS[seed % len(LENGTHS)]
    positions = random_map(draw, trained)
    where = (positions.method, positions.trained, positions.window, positions.group)
    cuts = [0, *sorted(draw.integers(0, length + 1, 4).tolist()), length]
    seen: dict[tuple[int, int], int] = {}
    for start, end in itertools.pairwise(cuts):
        done = start
        for run in positions.runs(start, end):
            assert run.start == done < run.end
            done = run.end
            for piece, i in itertools.product(run.pieces, range(run.end - run.start)):
                query = run.start + i
                keys = np.arange(piece.first[i], piece.end[i])
                moved = keys if piece.queries is None else positions.of_keys(run.form, keys)
                at = query if piece.queries is None else int(piece.queries[i])
                for key, place in zip(keys.tolist(), moved.tolist(), strict=True):
                    assert (query, key) not in seen
                    seen[query, key] = at - place
        assert done == end
    wanted = {(i, j): np.subtract(*oracle.place(*where, i, j)) for i in range(length) for j in range(i + 1)}
    assert seen == wanted


@pytest.mark.parametrize("seed", range(20))
def test_no_distance_reaches_the_trained_length(seed: int) -> None:
    draw = np.random.default_rng(seed)
    positions = random_map(draw, int(draw.integers(2, 70)))
    length = min(positions.longest, 400)
    for run in positions.runs(0, length):
        for piece in run.pieces:
            at = np.arange(run.start, run.end) if piece.queries is None else piece.queries
            first = piece.first if piece.queries is None else positions.of_keys(run.form, piece.first)
            some = piece.first < piece.end
            assert np.all((at - first)[some] < positions.trained)
    assert all(run.form == 0 for run in positions.runs(0, min(positions.unchanged, 400)))
    if positions.longest < LONGEST:  # one token more would reach it
        last = next(positions.runs(positions.longest, positions.longest + 1))
        far = [int(piece.queries.max()) for piece in last.pieces if piece.queries is not None]
        assert positions.group == 1 or far == [positions.trained]


def test_what_is_not_given_is_chosen_from_the_lengths() -> None:
    assert position_map("dynamic", 8192) == PositionMap("dynamic", 8192, 2048)
    assert position_map("dca", 8192) == PositionMap("dca", 8192, 6144)
    assert position_map("dca:100", 8192).window == 100
    assert position_map("self-extend:128:12", 512) == PositionMap("self-extend", 512, 128, 12)
    groups = {length: position_map("self-extend", 512, length) for length in (1, 512, 513, 1024, 1025, 4096, None)}
    assert [chosen.group for chosen in groups.values()] == [1, 1, 4, 4, 8, 16, 16]
    assert all(chosen.longest >= (length or 4096) for length, chosen in groups.items())
    assert PositionMap("self-extend", 512, 128, 10).longest < 4096 <= PositionMap("self-extend", 512, 128, 11).longest
    for extend in ("dynamic:64", "dca:100", "self-extend:128:12"):
        assert position_map(extend, 512).extend == extend


@pytest.mark.parametrize(
    "extend, trained, said",
    [
        (
            "grouped",
            512,
            "must be self-extend, dca, dynamic, or with window and group as in self-extend:1024:12",
        ),
        ("", 512, "extend must be"),
        ("dynamic:", 512, "extend must be"),
        ("dynamic:-4", 512, "extend must be"),
        ("self-extend:1:2:3", 512, "extend must be"),
        ("dynamic:512", 512, "the window of dynamic must be in [1, 511] tokens, got 512"),
        ("dca:0", 512, "the window of dca must be in [1, 511] tokens, got 0"),
        ("dynamic:64:2", 512, "dynamic takes no group"),
        ("self-extend:64:0", 512, "a group must have 1 to 2**31 tokens, got 0"),
        ("dynamic", None, "which config.json does not state"),
        ("dca", 1, "and the checkpoint's is 1"),
    ],
)
def test_wrong_maps_are_refused(extend: str, trained: int | None, said: str) -> None:
    with pytest.raises(UsageError) as error:
        position_map(extend, trained)
    assert said in error.value.message and error.value.option == "extend"
    with pytest.raises(UsageError, match="needs a group"):
        PositionMap("self-extend", 512, 64)


class Layer:
    """Attention of random projections, fed in chunks: what `attention.py` does in a model."""

    def __init__(self, rope: RopeConfig, seed: int, heads: int = 4, kv_heads: int = 2, dtype: mx.Dtype = mx.float32):
        draw = np.random.default_rng(seed)
        frequencies = rope.frequencies if rope.depends_on_length else rope.frequencies()
        self.traditional = bool(draw.integers(2))
        self.rope = ResonanceRoPE(frequencies, self.traditional, rope.positions)
        self.config, self.draw, self.heads, self.kv_heads, self.dtype = rope, draw, heads, kv_heads, dtype

    def inputs(self, length: int, dims: int) -> list[np.ndarray]:
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [self.draw.standard_normal((1, count, length, dims)).astype(np.float32) for count in counts]

    def run(self, inputs: list[np.ndarray], chunks: list[int], cache: Any) -> np.ndarray:
        """The outputs of all tokens, (H, L, D)."""
        q, k, v = (mx.array(x).astype(self.dtype) for x in inputs)
        self.rope.expect(q.shape[2])
        outputs, start = [], 0
        for size in chunks:
            part = slice(start, start + size)
            raw = q[:, :, part]
            mask = "causal" if size > 1 else None
            with self.rope.sharing(size, start, like=raw):
                queries, keys = self.rope.rotate(raw, k[:, :, part], start, self.rope.shared)
                values = v[:, :, part]
                if cache is not None:
                    keys, values = cache.update_and_fetch(keys, values)
                assert self.rope.positions is not None
                options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5}
                if attend.reaches_past(self.rope.positions, start, size, mask):
                    options |= {"rope": self.rope, "cache": cache, "offset": start}
                    outputs.append(attend.attend_mapped(raw, queries, keys, values, **options))
                elif hasattr(cache, "group_size"):
                    outputs.append(attend.attend_quantized(queries, keys, values, cache=cache, mask=mask, **options))
                else:
                    outputs.append(attend.attend(queries, keys, values, mask=mask, **options))
            mx.eval(outputs[-1])
            start += size
        return np.array(mx.concatenate(outputs, axis=2).astype(mx.float32))[0]

    def expected(self, inputs: list[np.ndarray]) -> np.ndarray:
        """The oracle's outputs."""
        positions = self.config.positions
        assert positions is not None
        q, k, v = (np.array(mx.array(x).astype(self.dtype).astype(mx.float32), np.float64)[0] for x in inputs)
        frequencies = self.config.frequencies(q.shape[1])
        where = (positions.method, positions.trained, positions.window, positions.group)
        repeats = self.heads // self.kv_heads
        return np.stack([
            oracle.mapped_attention(
                q[h], k[h // repeats], v[h // repeats], frequencies.wavelengths, frequencies.attention_scale, where,
                self.traditional,
            )
            for h in range(self.heads)
        ])  # fmt: skip


def cut(draw: np.random.Generator, length: int) -> list[int]:
    """Chunks of a text, single tokens among them."""
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(int(min(left, draw.choice([1, 1, 2, 3, draw.integers(1, length + 1)]))))
    return sizes


@pytest.mark.parametrize("seed", [*range(14), *(pytest.param(n, marks=pytest.mark.long) for n in range(14, 42))])
def test_attention_is_the_oracles(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rope type, map, chunks, block of scores, with and without a cache, within 1e-4 of the largest output."""
    draw = np.random.default_rng(seed)
    rope, length = random_rope(seed), int(draw.integers(10, 90))
    trained = int(draw.integers(3, 40))
    rope = replace(rope, positions=random_map(draw, trained))
    layer = Layer(rope, seed, kv_heads=int(draw.choice([1, 2, 4])))
    inputs = layer.inputs(length, 16 + 2 * int(draw.integers(2)))
    expected = layer.expected(inputs)
    bound = 1e-4 * np.abs(expected).max()
    for blocks in (attend.SCORES, 4 * 7 * length):
        monkeypatch.setattr(attend, "SCORES", blocks)
        whole = layer.run(inputs, [length], None)
        assert np.abs(whole - expected).max() <= bound
        for _ in range(2):
            cache = PlainCache()
            cache.step = int(draw.choice([8, 256]))
            assert np.abs(layer.run(inputs, cut(draw, length), cache) - expected).max() <= bound
            assert np.abs(layer.run(inputs, [length], None) - whole).max() <= bound


@pytest.mark.parametrize("extend", ["self-extend:8:4", "dca:20", "dynamic:8"])
def test_inside_the_trained_length_nothing_changes_bit_for_bit(extend: str) -> None:
    rope = replace(random_rope(4), positions=position_map(extend, 32))
    assert rope.positions is not None
    inputs = Layer(rope, 1).inputs(rope.positions.unchanged, 16)
    plain = Layer(replace(rope, positions=PositionMap("dynamic", 10_000, 5)), 1)
    for chunks in ([len(inputs[0][0, 0])], [5, 1, len(inputs[0][0, 0]) - 6]):
        same = [layer.run(inputs, chunks, PlainCache()) for layer in (Layer(rope, 1), plain)]
        assert np.array_equal(*same)


@pytest.mark.parametrize("bits", [8, "8,4", 4])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("extend", ["self-extend:8:7", "dca:20", "dynamic:8"])
def test_quantized_keys_are_moved_too(extend: str, rotate: bool, bits: Any) -> None:
    """The error is that of the format: as large as without a map, up to the second quantization of far keys."""
    rope = RopeConfig(dims=64, rope_type="resonance_default", positions=position_map(extend, 32))
    layer, format = Layer(rope, 3, heads=2, kv_heads=1), KVFormat.of(bits, rotate)
    inputs = layer.inputs(100, 64)
    expected, chunks = layer.expected(inputs), [40, 1, 1, 30, 2, 1, 25]
    error = np.abs(layer.run(inputs, chunks, QuantizedCache(64, format)) - expected)
    plain = Layer(replace(rope, positions=PositionMap("dynamic", 10_000, 5)), 3, heads=2, kv_heads=1)
    before = np.abs(plain.run(inputs, chunks, QuantizedCache(64, format)) - plain.run(inputs, [100], None))
    assert 0 < np.sqrt((error**2).mean()) <= 2 * np.sqrt((before**2).mean())


@pytest.mark.parametrize("bits", [None, 8])
def test_any_trim_leaves_what_a_plain_pass_would_have(bits: int | None) -> None:
    """Tokens are taken back and others follow: far keys of the tokens taken back are forgotten."""
    for extend in ("self-extend:8:4", "dca:12", "dynamic:8"):
        rope = RopeConfig(dims=64, rope_type="resonance_default", positions=position_map(extend, 24))
        layer = Layer(rope, 5)
        one, other = layer.inputs(90, 64), layer.inputs(90, 64)
        mixed = [np.concatenate([a[:, :, :41], b[:, :, 41:]], axis=2) for a, b in zip(one, other, strict=True)]
        make = (lambda: QuantizedCache(64, KVFormat.of(bits))) if bits else PlainCache
        cache: Any = make()
        layer.run([x[:, :, :70] for x in one], [50, 20], cache)
        cache.trim(70 - 41)
        again = Continued(layer, 41).run([x[:, :, 41:] for x in mixed], [1, 8, 40], cache)
        whole = layer.run(mixed, [41, 1, 8, 40], make())[:, 41:]
        assert np.abs(again - whole).max() <= 1e-5 * np.abs(whole).max()


class Continued:
    """A layer whose text goes on after some tokens."""

    def __init__(self, layer: Layer, start: int) -> None:
        self.layer, self.start = layer, start

    def run(self, inputs: list[np.ndarray], chunks: list[int], cache: Any) -> np.ndarray:
        before = [np.zeros((*x.shape[:2], self.start, x.shape[3]), np.float32) for x in inputs]
        padded = [np.concatenate(pair, axis=2) for pair in zip(before, inputs, strict=True)]
        outputs, start = [], self.start
        q, k, v = (mx.array(x).astype(self.layer.dtype) for x in padded)
        rope = self.layer.rope
        for size in chunks:
            part = slice(start, start + size)
            with rope.sharing(size, start, like=q):
                queries, keys = rope.rotate(q[:, :, part], k[:, :, part], start, rope.shared)
                keys, values = cache.update_and_fetch(keys, v[:, :, part])
                options: dict[str, Any] = {"rope": rope, "cache": cache, "offset": start, "scale": q.shape[-1] ** -0.5}
                outputs.append(attend.attend_mapped(q[:, :, part], queries, keys, values, **options))
            mx.eval(outputs[-1])
            start += size
        return np.array(mx.concatenate(outputs, axis=2))[0]


def test_a_key_is_moved_once_and_from_its_own_form() -> None:
    """In 16 bits, after 500 tokens one at a time, the far keys are still one rounding from those of float64."""
    rope = RopeConfig(dims=64, rope_type="default", positions=position_map("dynamic:8", 24))
    layer = Layer(rope, 7, dtype=mx.bfloat16)
    inputs = layer.inputs(500, 64)
    cache = PlainCache()
    layer.run(inputs, [1] * 500, cache)
    positions = rope.positions
    assert positions is not None
    form = positions.group_of(499)
    wavelengths = rope.frequencies().wavelengths
    theta = oracle.angles((positions.of_keys(form, np.arange(400))).tolist(), wavelengths)
    keys = np.array(mx.array(inputs[1]).astype(mx.bfloat16).astype(mx.float32), np.float64)[0, :, :400]
    exact = oracle.rotate(keys, theta, 1.0, layer.traditional)
    moved = np.array(cache.far._arrays[0, :, :400].astype(mx.float32), np.float64)
    # One rounding for the key's own position, one for the other: 2**-9 each of a pair's length.
    assert np.abs(moved - exact).max() <= 2 * 2**-9 * 2**0.5 * np.abs(keys).max()


def test_rows_of_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="dynamic is for one text at a time") as error:
        attend.reaches_past(position_map("dynamic", 32), mx.array([1, 2]), 1, None)
    assert error.value.option == "extend"
