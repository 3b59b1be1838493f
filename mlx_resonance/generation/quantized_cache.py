"""Quantized KV caches: keys and values with their own bits, perhaps rotated; of one text, and of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from .._mlx_lm import BatchKVCache, KVCache, QuantizedKVCache
from .far_keys import FarKeys
from .kv_format import Arrays, KVFormat


class QuantizedCache(QuantizedKVCache):  # type: ignore[misc]  # mypy does not follow mlx-lm
    """The keys and values of a text: mlx-lm's QuantizedKVCache with a KV format; it can become a row of a batch.

    It has no `bits`: mlx-lm's own attention, which has one number for both, cannot read it.

    Args:
        group_size: numbers that share a scale and a bias.
        format: a quantized one.
    """

    keys: Any
    values: Any
    offset: int

    def __init__(self, group_size: int, format: KVFormat) -> None:
        super().__init__(group_size)
        del self.bits
        self.format, self.far = format, FarKeys()

    @classmethod
    def of(cls, cache: KVCache, group_size: int, format: KVFormat) -> QuantizedCache:
        """A quantized cache of the tokens of another."""
        made = cls(group_size, format)
        if cache.keys is not None:
            made.step = cache.offset
            made.update_and_fetch(cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :])
            made.step = cls.step
        return made

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Arrays, Arrays]:
        """Append keys and values (B, H, L, D) in the model's type. Returns all of them, quantized."""
        before, new = self.offset, self.format.quantize(keys, values, self.group_size)
        if self.keys is None or before + keys.shape[2] > self.keys[0].shape[2]:
            self._grow(new, -(-keys.shape[2] // self.step) * self.step)
        self.offset = before + keys.shape[2]
        for held, part in zip((*self.keys, *self.values), (*new[0], *new[1]), strict=True):
            held[..., before : self.offset, :] = part
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Arrays, Arrays]:
        """All of them, quantized."""
        held: tuple[Arrays, Arrays] = tree_map(lambda x: x[:, :, : self.offset], (self.keys, self.values))
        return held

    def _grow(self, like: tuple[Arrays, Arrays], tokens: int) -> None:
        """Make room for some tokens after those that it holds."""
        room = tree_map(lambda x: mx.zeros((*x.shape[:2], tokens, x.shape[3]), x.dtype), like)
        if self.keys is not None:
            held = tree_map(lambda x: x[..., : self.offset, :], (self.keys, self.values))
            room = tree_map(lambda x, new: mx.concatenate([x, new], axis=2), held, room)
        self.keys, self.values = room

    def dense_keys(self, first: int, end: int, like: mx.Dtype) -> mx.array:
        """Keys in a range of tokens, in a type, not rotated."""
        packed, scales, biases = (part[:, :, first:end] for part in self.keys)
        options: dict[str, Any] = {"group_size": self.group_size, "bits": self.format.key_bits}
        return self.format.restored(mx.dequantize(packed, scales.astype(like), biases.astype(like), **options))

    def stored_keys(self, keys: mx.array) -> Arrays:
        """Keys as this cache stores them."""
        return self.format.quantize_keys(keys, self.group_size)

    def trim(self, n: int) -> int:
        """Remove the last tokens. Returns their number."""
        trimmed: int = super().trim(n)
        self.far.trim(self.offset)
        return trimmed

    @property
    def state(self) -> Any:
        """The arrays."""
        return self.keys, self.values

    def size(self) -> int:
        """Number of tokens."""
        return int(self.offset)

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> BatchQuantizedCache:
        """A batch of the rows that several caches hold."""
        parts = [BatchKVCache.merge([_part(cache, i) for cache in caches]) for i in range(3)]
        return BatchQuantizedCache(parts, caches[0].group_size, caches[0].format)


class BatchQuantizedCache:
    """The quantized keys and values of a batch: mlx-lm's BatchKVCache for each of the three arrays of a quantized one.

    Packed numbers, scales and biases have one row per token, so that whatever mlx-lm does to the tokens of a batch
    (padding, rolling, merging, selecting) it does to each of them.

    Args:
        parts: the keys' and values' packed numbers, their scales, their biases.
        group_size, format: as in QuantizedCache.
    """

    def __init__(self, parts: Sequence[Any], group_size: int, format: KVFormat) -> None:
        self.parts, self.group_size, self.format = list(parts), group_size, format

    @property
    def offset(self) -> mx.array:
        """Tokens of each row, of shape (B,)."""
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.parts)

    @property
    def state(self) -> list[Any]:
        """The arrays."""
        return [part.state for part in self.parts]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[tuple[mx.array, ...], ...]:
        """Append keys and values (B, H, L, D) in the model's type. Returns all of them, quantized."""
        pairs = zip(self.parts, *self.format.quantize(keys, values, self.group_size), strict=True)
        return tuple(zip(*(part.update_and_fetch(k, v) for part, k, v in pairs), strict=True))

    def make_mask(self, *args: Any, **options: Any) -> Any:
        """As BatchKVCache's, and these below."""
        return self.parts[0].make_mask(*args, **options)

    def size(self) -> int:
        """Tokens of the longest row, padding included."""
        return int(self.parts[0].size())

    def empty(self) -> bool:
        """Whether it holds no arrays."""
        return bool(self.parts[0].empty())

    def is_trimmable(self) -> bool:
        """Whether `trim` works."""
        return True

    def trim(self, n: int) -> int:
        """Remove the last tokens of every row. Returns their number."""
        return min(int(part.trim(n)) for part in self.parts)

    def prepare(self, **options: Any) -> None:
        """Announce the padding of the tokens that come next."""
        for part in self.parts:
            part.prepare(**options)

    def finalize(self) -> None:
        """Turn padding on the right into padding on the left."""
        for part in self.parts:
            part.finalize()

    def filter(self, rows: Any) -> None:
        """Keep some rows."""
        for part in self.parts:
            part.filter(rows)

    def extend(self, other: BatchQuantizedCache) -> None:
        """Append the rows of another batch."""
        for part, further in zip(self.parts, other.parts, strict=True):
            _give_types(part, further)
            _give_types(further, part)
            part.extend(further)

    def extract(self, row: int) -> QuantizedCache:
        """The cache of one row."""
        cache = QuantizedCache(self.group_size, self.format)
        parts = [part.extract(row) for part in self.parts]
        cache.keys, cache.values = tuple(part.keys for part in parts), tuple(part.values for part in parts)
        cache.offset = parts[0].offset
        return cache


def _give_types(part: BatchKVCache, like: BatchKVCache) -> None:
    """Give an empty cache arrays of length 0: mlx-lm 0.31 turns what it extends without them into float32."""
    if part.keys is None and like.keys is not None:
        rows = part.offset.shape[0]
        arrays = (mx.zeros((rows, x.shape[1], 0, x.shape[3]), x.dtype) for x in (like.keys, like.values))
        part.keys, part.values = arrays


def _part(cache: QuantizedCache, i: int) -> KVCache:
    """One of the three arrays of the keys and of the values, as a cache."""
    part = KVCache()
    if cache.keys is not None:
        part.keys, part.values, part.offset = cache.keys[i], cache.values[i], cache.offset
    return part
