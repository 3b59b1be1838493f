"""KV caches of a batch: quantized ones, which mlx-lm cannot batch, and copies of a beginning that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .._mlx_lm import BatchKVCache, KVCache, QuantizedKVCache
from .cache import make_cache


class BatchQuantizedKVCache:
    """The quantized keys and values of a batch: mlx-lm's BatchKVCache for each of the three arrays of a quantized one.

    Packed numbers, scales and biases have one row per token, so that whatever mlx-lm does to the tokens of a batch
    (padding, rolling, merging, selecting) it does to each of them.

    Args:
        parts: the keys' and values' packed numbers, their scales, their biases.
        group_size, bits: as in mlx-lm's QuantizedKVCache.
    """

    def __init__(self, parts: Sequence[Any], group_size: int, bits: int) -> None:
        self.parts, self.group_size, self.bits = list(parts), group_size, bits

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
        quantized = (mx.quantize(x, group_size=self.group_size, bits=self.bits) for x in (keys, values))
        pairs = zip(self.parts, *quantized, strict=True)
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

    def extend(self, other: BatchQuantizedKVCache) -> None:
        """Append the rows of another batch."""
        for part, further in zip(self.parts, other.parts, strict=True):
            _give_types(part, further)
            _give_types(further, part)
            part.extend(further)

    def extract(self, row: int) -> RowQuantizedKVCache:
        """The cache of one row."""
        cache = RowQuantizedKVCache(self.group_size, self.bits)
        parts = [part.extract(row) for part in self.parts]
        cache.keys, cache.values = tuple(part.keys for part in parts), tuple(part.values for part in parts)
        cache.offset = parts[0].offset
        return cache

    @classmethod
    def merge(cls, caches: Sequence[QuantizedKVCache]) -> BatchQuantizedKVCache:
        """A batch of the rows that several caches hold."""
        parts = [BatchKVCache.merge([_part(cache, i) for cache in caches]) for i in range(3)]
        return cls(parts, caches[0].group_size, caches[0].bits)


class RowQuantizedKVCache(QuantizedKVCache):  # type: ignore[misc]  # mypy does not follow mlx-lm
    """mlx-lm's QuantizedKVCache, which can become a row of a batch."""

    merge = BatchQuantizedKVCache.merge


def _give_types(part: BatchKVCache, like: BatchKVCache) -> None:
    """Give an empty cache arrays of length 0: mlx-lm 0.31 turns what it extends without them into float32."""
    if part.keys is None and like.keys is not None:
        rows = part.offset.shape[0]
        arrays = (mx.zeros((rows, x.shape[1], 0, x.shape[3]), x.dtype) for x in (like.keys, like.values))
        part.keys, part.values = arrays


def _part(cache: QuantizedKVCache, i: int) -> KVCache:
    """One of the three arrays of the keys and of the values, as a cache."""
    part = KVCache()
    if cache.keys is not None:
        part.keys, part.values, part.offset = cache.keys[i], cache.values[i], cache.offset
    return part


def row_caches(model: nn.Module, kv_bits: int | None = None) -> list[Any]:
    """Empty caches for one row of a batch, one per layer. Raises UsageError like `make_cache`."""
    return beginning(make_cache(model, KVCache.step, kv_bits), 0)


def beginning(caches: Sequence[Any], length: int) -> list[Any]:
    """Caches for a row of a batch that begins with the first `length` tokens of others, which must hold them.

    Until a batch is made of them they share the memory of the others.
    """
    return [_beginning(cache, length) for cache in caches]


def _beginning(cache: Any, length: int) -> Any:
    if isinstance(cache, QuantizedKVCache):
        row = RowQuantizedKVCache(cache.group_size, cache.bits)
    elif isinstance(cache, KVCache):
        row = KVCache()
    else:  # with a sliding window: it cannot be shared
        return cache
    if length:
        row.keys, row.values = tree_map(lambda x: x[..., :length, :], (cache.keys, cache.values))
        row.offset = length
    return row


def shareable(caches: Sequence[Any]) -> bool:
    """Whether rows of a batch can begin with copies of these caches: not if one has a sliding window."""
    return all(isinstance(cache, (KVCache, QuantizedKVCache)) for cache in caches)
