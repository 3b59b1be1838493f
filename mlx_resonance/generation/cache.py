"""KV caches: mlx-lm's, allocated once for the whole text, in the model's type or in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from ..errors import UsageError

GROUP_SIZES = (64, 32)  # values that share a scale and a bias; MLX has no smaller groups


def make_cache(model: nn.Module, capacity: int, kv_bits: int | None = None) -> list[Any]:
    """Make a cache for every layer.

    Args:
        model: from `load`.
        capacity: tokens to allocate for. mlx-lm's caches grow by copying, which briefly needs twice the memory.
        kv_bits: 4 or 8 to quantize keys and values from the first token on; None for the model's type.

    Raises:
        UsageError: a layer's KV cache cannot be quantized: its head size is not a multiple of 32, or it has a sliding
            window.
    """
    caches = make_prompt_cache(model)
    if kv_bits is not None:
        size = group_size(head_dim(model))
        for cache in caches:
            if not isinstance(cache, KVCache):
                raise UsageError("a layer with a sliding window cannot quantize its KV cache", option="kv_bits")
        caches = [QuantizedKVCache(size, kv_bits) for _ in caches]
    for cache in caches:
        if isinstance(cache, (KVCache, QuantizedKVCache)):
            cache.step = capacity  # what it grows by
    return caches


def group_size(dims: int) -> int:
    """How many features of a head share a scale. Raises UsageError if no group size divides `dims`."""
    for size in GROUP_SIZES:
        if dims % size == 0:
            return size
    raise UsageError(f"kv_bits needs a head size that is a multiple of {GROUP_SIZES[-1]}, got {dims}", option="kv_bits")


def head_dim(model: nn.Module) -> int:
    """Number of features per head."""
    args = model.args
    return int(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)
