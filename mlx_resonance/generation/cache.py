"""KV caches: allocated once for the whole text, in the model's type or in a quantized KV format."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .._mlx_lm import KVCache, QuantizedKVCache
from ..errors import UsageError, check_option
from .kv_format import KVBits, KVFormat, group_size
from .plain_cache import PlainCache
from .quantized_cache import QuantizedCache


def make_cache(model: nn.Module, capacity: int, kv_bits: KVBits = None) -> list[Any]:
    """Make a cache for every layer.

    Args:
        model: from `load`.
        capacity: tokens to allocate for. mlx-lm's caches grow by copying, which briefly needs twice the memory.
        kv_bits: as in `KVFormat.of`: keys and values are quantized from the first token on; None for the model's type.

    Raises:
        UsageError: the format is not supported, or not for this model: a layer has a sliding window, or the head size
            is not one of its.
    """
    caches, format = make_prompt_cache(model), KVFormat.of(kv_bits)
    if format.quantized:
        _check(model, caches, format)
        caches = [QuantizedCache(group_size(head_dim(model)), format) for _ in caches]
    caches = [PlainCache() if type(cache) is KVCache else cache for cache in caches]
    for cache in caches:
        if isinstance(cache, (KVCache, QuantizedKVCache)):
            cache.step = capacity  # what it grows by
    return caches


def quantize(model: nn.Module, caches: list[Any], kv_bits: KVBits) -> None:
    """Replace caches in their list by quantized ones with the same tokens.

    They are mlx-lm's own, as its functions expect, if it has the format: one number of bits, not rotated; but not for a
    model with a position map, whose keys are kept twice.

    Raises:
        UsageError: a layer cannot be quantized, as in `make_cache`, or it is, in another format.
    """
    format = KVFormat.of(kv_bits)
    _check(model, caches, format)
    for cache in caches:
        if isinstance(cache, QuantizedKVCache) and (held := format_of(cache)) != format:
            raise UsageError(f"the caches have {held.value} bits, kv_bits asks for {format.value}", option="kv_bits")
    size = group_size(head_dim(model))
    same = format.key_bits == format.value_bits and not format.rotate and model.args.rope.positions is None
    for i, cache in enumerate(caches):
        if not isinstance(cache, QuantizedKVCache):
            caches[i] = cache.to_quantized(size, format.key_bits) if same else QuantizedCache.of(cache, size, format)


def format_of(cache: QuantizedKVCache) -> KVFormat:
    """The KV format of a quantized cache, mlx-lm's or ours."""
    return cache.format if isinstance(cache, QuantizedCache) else KVFormat.of(cache.bits)


def _check(model: nn.Module, caches: list[Any], format: KVFormat) -> None:
    format.check(head_dim(model))
    if not all(isinstance(cache, (KVCache, QuantizedKVCache)) for cache in caches):
        raise UsageError("a layer with a sliding window cannot quantize its KV cache", option="kv_bits")


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


def head_dim(model: nn.Module) -> int:
    """Number of features per head."""
    args = model.args
    return int(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)
