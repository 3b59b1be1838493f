"""Quantized keys and values of a batch: whatever happens to its rows, they hold what mlx-lm's batch cache would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load
from mlx_resonance.errors import UsageError
from mlx_resonance.generation.batch_cache import beginning, row_caches
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.memory import kv_per_token
from mlx_resonance.generation.quantized_cache import BatchQuantizedCache, QuantizedCache

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

HEADS, DIMS, GROUP = 2, 64, 32
FORMATS = [KVFormat.of(4), KVFormat.of(8), KVFormat.of("8,4"), KVFormat.of("8,4", True)]


def dequantized(arrays: Any, bits: int) -> mx.array:
    packed, *scales = arrays
    return mx.dequantize(packed, *(x.astype(mx.float32) for x in scales), group_size=GROUP, bits=bits)


class Pair:
    """A quantized batch, and mlx-lm's batch cache with the same numbers in the model's type."""

    def __init__(self, format: KVFormat, ours: Any, theirs: Any) -> None:
        self.format, self.ours, self.theirs = format, ours, theirs
        self.bits = format.key_bits, format.value_bits

    @classmethod
    def of(cls, format: KVFormat, lengths: list[int], seed: int = 0) -> Pair:
        """Rows with some tokens each."""
        rows = [QuantizedCache(GROUP, format) for _ in lengths]
        plain = [KVCache() for _ in lengths]
        for i, length in enumerate(lengths):
            if length:
                keys, values = numbers(1, length, seed + i), numbers(1, length, seed + i + 100)
                rows[i].update_and_fetch(keys, values)
                plain[i].update_and_fetch(*rounded(keys, values, format))
        return cls(format, rows[0].merge(rows), plain[0].merge(plain))

    def do(self, name: str, *args: Any, **options: Any) -> None:
        """The same to both."""
        for cache in (self.ours, self.theirs):
            getattr(cache, name)(*args, **options)

    def append(self, length: int, seed: int) -> None:
        """New tokens in every row; what attention gets must be equal."""
        rows = self.theirs.offset.shape[0]
        keys, values = numbers(rows, length, seed), numbers(rows, length, seed + 50)
        got = self.ours.update_and_fetch(keys, values)
        wanted = self.theirs.update_and_fetch(*rounded(keys, values, self.format))
        visible = self.ours.make_mask(1)[:, :, 0, :-1, None]
        for ours, theirs, bits in zip(got, wanted, self.bits, strict=True):
            assert mx.array_equal(mx.where(visible, dequantized(ours, bits), 0), mx.where(visible, theirs, 0))
        self.check()

    def check(self) -> None:
        assert self.ours.offset.tolist() == self.theirs.offset.tolist()
        assert (self.ours.size(), self.ours.empty()) == (self.theirs.size(), self.theirs.empty())
        assert mx.array_equal(self.ours.make_mask(3), self.theirs.make_mask(3))
        for row in range(self.theirs.offset.shape[0]):
            ours, theirs = self.ours.extract(row), self.theirs.extract(row)
            assert isinstance(ours, QuantizedCache) and ours.format == self.format and ours.offset == theirs.offset
            if not ours.offset:  # MLX does not dequantize an empty array
                continue
            assert mx.array_equal(dequantized(ours.keys, self.bits[0]), theirs.keys)
            assert mx.array_equal(dequantized(ours.values, self.bits[1]), theirs.values)


def numbers(rows: int, length: int, seed: int) -> mx.array:
    return mx.random.normal((rows, HEADS, length, DIMS), key=mx.random.key(seed))


def rounded(keys: mx.array, values: mx.array, format: KVFormat) -> list[mx.array]:
    """To what the format can hold."""
    arrays = format.quantize(keys, values, GROUP)
    return [dequantized(x, bits) for x, bits in zip(arrays, (format.key_bits, format.value_bits), strict=True)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.value))
def test_a_quantized_batch_holds_what_a_batch_would(format: KVFormat) -> None:
    pair = Pair.of(format, [3, 0, 300])
    pair.check()
    pair.do("prepare", lengths=[7, 2, 9], right_padding=[2, 7, 0])
    pair.append(9, seed=1)
    pair.do("finalize")
    pair.check()
    pair.append(1, seed=2)
    pair.do("filter", [1, 0])  # the longest leaves: less padding
    pair.check()
    other = Pair.of(format, [400, 20], seed=7)
    pair.ours.extend(other.ours)
    pair.theirs.extend(other.theirs)
    pair.append(260, seed=3)  # past what is allocated
    assert pair.ours.is_trimmable() and pair.ours.trim(4) == pair.theirs.trim(4) == 4
    pair.append(1, seed=4)
    pair.do("filter", mx.array([3]))
    pair.append(1, seed=5)


def test_empty_rows_and_batches(format: KVFormat = FORMATS[2]) -> None:
    pair = Pair.of(format, [0, 0])
    assert pair.ours.empty() and pair.ours.nbytes == 0
    other = Pair.of(format, [0])
    pair.ours.extend(other.ours)
    pair.theirs.extend(other.theirs)
    pair.append(4, seed=1)
    other = Pair.of(format, [0])
    pair.ours.extend(other.ours)
    pair.theirs.extend(other.theirs)
    pair.append(1, seed=2)


@pytest.mark.parametrize("bits", [4, 8, "8,4", None])
def test_bytes_are_those_of_the_plan(checkpoint: Path, bits: int | str | None) -> None:
    model, tokenizer = load(checkpoint)
    rows, length = 3, 256  # mlx-lm allocates so many at once
    caches = [row_caches(model, bits) for _ in range(rows)]
    batch = [layer[0].merge(list(layer)) for layer in zip(*caches, strict=True)]
    model(mx.array([[tokenizer.bos_token_id] * length] * rows), cache=batch)
    mx.eval([layer.state for layer in batch])
    per_token = kv_per_token(Checkpoint.open(checkpoint).dimensions, bits)
    assert sum(layer.nbytes for layer in batch) == rows * length * per_token
    assert {type(layer) for layer in batch} == {BatchQuantizedCache if bits else BatchKVCache}


@pytest.mark.parametrize("bits", [8, None])
def test_a_beginning_stays_when_its_source_goes_on(checkpoint: Path, bits: int | None) -> None:
    model, _ = load(checkpoint)
    source = row_caches(model, bits)
    tokens = mx.array([list(range(5, 45))])
    model(tokens, cache=source)
    row, whole = beginning(source, 30), beginning(source, 40)
    for layer in source:
        layer.trim(20)
    model(tokens + 100, cache=source)
    for short, long, layer in zip(row, whole, source, strict=True):
        arrays = [mx.concatenate([x.astype(mx.float32).reshape(-1, x.shape[2], x.shape[3])[:, :20] for x in (
            cache.keys if bits else (cache.keys,))], axis=-1) for cache in (short, long, layer)]  # fmt: skip
        assert mx.array_equal(arrays[0], arrays[1]) and mx.array_equal(arrays[0], arrays[2])
        assert (short.offset, long.offset, layer.offset) == (30, 40, 60)
    continued = [beginning(row, 30), beginning(whole, 30)]
    logits = [model(tokens[:, 30:], cache=caches) for caches in continued]
    assert mx.array_equal(*logits)


def test_a_sliding_window_cannot_be_quantized(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(checkpoint)
    windows = [RotatingKVCache(8) for _ in model.layers]
    monkeypatch.setattr("mlx_resonance.generation.cache.make_prompt_cache", lambda model: list(windows))
    with pytest.raises(UsageError, match="sliding window"):
        row_caches(model, 8)
    assert row_caches(model) == windows
