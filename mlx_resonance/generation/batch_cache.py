"""Caches of the rows of a batch: copies of a beginning that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_map

from .._mlx_lm import KVCache, QuantizedKVCache
from .cache import make_cache
from .kv_format import KVBits
from .quantized_cache import QuantizedCache


def row_caches(model: nn.Module, kv_bits: KVBits = None) -> list[Any]:
    """Empty caches for one row of a batch, one per layer. Raises UsageError like `make_cache`."""
    return beginning(make_cache(model, KVCache.step, kv_bits), 0)


def beginning(caches: Sequence[Any], length: int) -> list[Any]:
    """Caches for a row of a batch that begins with the first `length` tokens of others, which must hold them.

    Until a batch is made of them they share the memory of the others.
    """
    return [_beginning(cache, length) for cache in caches]


def _beginning(cache: Any, length: int) -> Any:
    if isinstance(cache, QuantizedCache):
        row = QuantizedCache(cache.group_size, cache.format)
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
