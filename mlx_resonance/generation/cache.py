"""KV caches: mlx-lm's, allocated once for the whole text, in the model's type or in 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .._mlx_lm import KVCache, QuantizedKVCache
from ..errors import UsageError, check_option
from .plain_cache import PlainCache

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
        quantize(model, caches, kv_bits)
    caches = [PlainCache() if type(cache) is KVCache else cache for cache in caches]
    for cache in caches:
        if isinstance(cache, (KVCache, QuantizedKVCache)):
            cache.step = capacity  # what it grows by
    return caches


def quantize(model: nn.Module, caches: list[Any], kv_bits: int) -> None:
    """Replace caches in their list by quantized ones with the same tokens.

    Raises:
        UsageError: a layer cannot be quantized, as in `make_cache`, or it is, to another number of bits.
    """
    size = group_size(head_dim(model))
    for cache in caches:
        if not isinstance(cache, (KVCache, QuantizedKVCache)):
            raise UsageError("a layer with a sliding window cannot quantize its KV cache", option="kv_bits")
        if getattr(cache, "bits", kv_bits) != kv_bits:
            raise UsageError(f"the caches have {cache.bits} bits, kv_bits asks for {kv_bits}", option="kv_bits")
    caches[:] = [cache.to_quantized(size, kv_bits) if isinstance(cache, KVCache) else cache for cache in caches]


def check_format(model: nn.Module, kv_group_size: int | None, quantized_kv_start: int) -> None:
    """Raise UsageError if mlx-lm's options ask for another format than `make_cache` makes; None is its own size."""
    size = group_size(head_dim(model))
    check_option("kv_group_size", kv_group_size in (None, size), f"{size} for this head size", kv_group_size)
    check_option("quantized_kv_start", quantized_kv_start == 0, "0: all tokens are quantized", quantized_kv_start)


def cached_tokens(model: nn.Module, caches: list[Any], new: int) -> int:
    """How many tokens caches from mlx-lm hold.

    Args:
        model: from `load`.
        caches: one per layer.
        new: number of tokens that they are to take in addition.

    Raises:
        UsageError: they are not caches of one text, one per layer, or a rotating one would drop tokens.
    """
    layers = len(model.layers)
    if not isinstance(caches, list) or len(caches) != layers:
        got = f"{len(caches)} of them" if isinstance(caches, list) else type(caches).__name__
        raise UsageError(f"prompt_cache must be a list of {layers} caches, one per layer, got {got}")
    held: Any = getattr(caches[0], "offset", None)
    for cache in caches:
        if not isinstance(held, int) or getattr(cache, "offset", None) != held:
            raise UsageError("prompt_cache must hold the same number of tokens of one text in every layer")
        if (most := getattr(cache, "max_size", None)) is not None and most < held + new:
            raise UsageError(
                f"a rotating cache of {most} tokens would drop the beginning of a text of {held + new} tokens"
            )
    return int(held)


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
