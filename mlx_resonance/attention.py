"""The attention patched into mlx-lm's models: exact angles, computed once per step, in launches of bounded size."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from .rope import ResonanceRoPE
from .rope_config import RopeConfig

# mlx-lm's model files whose attention consists of q_proj, k_proj, v_proj, optional q_norm and k_norm, rope and o_proj;
# each maps to the file whose attention it uses.
ADAPTED_FILES = {"llama": "llama", "smollm3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "granite": "granite"}
# Maximum queries × keys per head in one launch of attention: macOS limits how long a GPU may work without a break.
# 2048 queries reach it at 65 k keys.
BUDGET = 2**27


def set_rope(model: nn.Module, rope: RopeConfig) -> None:
    """Make a model from `ADAPTED_FILES` rotate as `rope` says, however it was built. Its weights do not change.

    All layers share one `ResonanceRoPE`; layers without rope (SmolLM 3) stay without. The classes in mlx-lm's file are
    patched once; their models that were not passed to this function work as before.
    """
    adapt(model)
    frequencies = rope.frequencies if rope.depends_on_length else rope.frequencies()
    module = ResonanceRoPE(frequencies, bool(getattr(model.args, "rope_traditional", False)))
    with_rope = getattr(model.args, "no_rope_layers", None) or [1] * len(model.layers)
    for layer, rotates in zip(model.layers, with_rope, strict=True):
        layer.self_attn._adapted = True
        if rotates:
            layer.self_attn.rope = module
    model.model.rope = module
    model.args.rope = rope


class Inference:
    """A model for a loop that generates: MLX can neither differentiate nor map what it computes.

    mlx-lm's loops take it in place of the model. The results are the same; on a GPU a step costs the CPU less.

    Args:
        model: one that `set_rope` has been called on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.of = model

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        with self.of.model.rope.inference():
            return self.of(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "of":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.of, name)


def next_token_logits(model: nn.Module, hidden: mx.array) -> mx.array:
    """Logits (…, vocabulary) from hidden states (…, hidden), computed as the model does after its layers."""
    args: Any = model.args
    logits = model.model.embed_tokens.as_linear(hidden) if args.tie_word_embeddings else model.lm_head(hidden)
    return logits / args.logits_scaling if hasattr(args, "logits_scaling") else logits  # Granite's


def adapt(model: nn.Module) -> None:
    """Patch the attention into the classes of a model from `ADAPTED_FILES`."""
    for kind, wrap in ((type(model.layers[0].self_attn), _attention), (type(model.model), _with_angles)):
        if not hasattr(kind.__call__, "of_mlx_lm"):
            call = wrap(kind.__call__)
            call.of_mlx_lm = kind.__call__  # type: ignore[attr-defined]
            kind.__call__, kind._adapted = call, False


def _with_angles(forward: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Wrap the stack of layers so that the angles of a step are computed once for all of them."""

    @wraps(forward)
    def call(self: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        rope = self.get("rope")
        if rope is None:
            return forward(self, inputs, cache, *args, **kwargs)
        embeddings = args[0] if args else kwargs.get("input_embeddings")
        x = inputs if embeddings is None else embeddings
        offset = next((layer.offset for layer in cache or () if layer is not None), 0)
        with rope.sharing(x.shape[1], offset, like=x):
            return forward(self, inputs, cache, *args, **kwargs)

    return call


def _attention(of_mlx_lm: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Grouped-query attention that rotates queries and keys in one call, by the angles of the step."""

    @wraps(of_mlx_lm)
    def call(self: Any, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        if not self._adapted:
            return of_mlx_lm(self, x, mask, cache)
        B, L, _ = x.shape
        part = self.__getitem__  # of a module: a tenth of the time that an attribute takes
        queries, keys, values = part("q_proj")(x), part("k_proj")(x), part("v_proj")(x)
        if L == 1:  # (B, H, L, D) without a transposition
            queries = queries.reshape(B, self.n_heads, 1, -1)
            keys = keys.reshape(B, self.n_kv_heads, 1, -1)
            values = values.reshape(B, self.n_kv_heads, 1, -1)
        else:
            queries = queries.reshape(B, L, self.n_heads, -1)
            keys = keys.reshape(B, L, self.n_kv_heads, -1)
            values = values.reshape(B, L, self.n_kv_heads, -1)
        if "q_norm" in self:
            queries, keys = part("q_norm")(queries), part("k_norm")(keys)
        if L > 1:
            queries, keys, values = (y.transpose(0, 2, 1, 3) for y in (queries, keys, values))
        rope = self.get("rope")
        if isinstance(rope, ResonanceRoPE):
            offset = 0 if cache is None else cache.offset
            queries, keys = rope.rotate(queries, keys, offset, rope.shared)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if hasattr(cache, "group_size"):
            output = attend_quantized(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
            output = output if L == 1 else output.transpose(0, 2, 1, 3)
        elif L == 1 and mask is None:
            output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        else:
            output = attend(queries, keys, values, scale=self.scale, mask=mask).transpose(0, 2, 1, 3)
        return part("o_proj")(output.reshape(B, L, -1))

    return call


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    """mlx-lm's attention, split along the queries if one launch would exceed `BUDGET`.

    Args:
        queries: (B, H, L, D).
        keys, values: (B, H_kv, S, D), as the cache returns them.
        scale: factor of the scores.
        mask: "causal", None, or an array that broadcasts to (B, H, L, S).

    Returns:
        Shape (B, H, L, D).
    """
    if queries.shape[2] == 1:
        return scaled_dot_product_attention(queries, keys, values, cache=None, scale=scale, mask=mask)
    size = max(1, BUDGET // (queries.shape[0] * keys.shape[2]))
    return attend_in_parts(
        scaled_dot_product_attention, queries, keys, values, size, cache=None, scale=scale, mask=mask
    )


def attend_quantized(
    queries: mx.array, keys: Any, values: Any, *, cache: Any, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Attention to quantized keys and values, which may have different bits and may be rotated.

    Args:
        queries, scale, mask: as in `attend`.
        keys, values: packed numbers, scales and biases, as the cache returns them.
        cache: the layer's: ours, which has a `format`, or mlx-lm's.
    """
    size, own = cache.group_size, getattr(cache, "format", None)
    key_bits, value_bits = (cache.bits, cache.bits) if own is None else (own.key_bits, own.value_bits)
    if own is not None:
        queries = own.asked(queries)
    if queries.shape[2] > 1:
        # A product with quantized keys holds all scores of a chunk, which take more memory than a layer's keys and
        # values in 16 bits: dequantize those for the fused attention instead.
        like = queries.dtype
        keys, values = (
            mx.dequantize(packed, scales.astype(like), biases.astype(like), group_size=size, bits=bits)
            for (packed, scales, biases), bits in ((keys, key_bits), (values, value_bits))
        )
        output = attend(queries, keys, values, scale=scale, mask=mask)
    else:  # the queries that share keys are tokens of one head: each of those is read once
        product: Any = mx.quantized_matmul  # of x, packed numbers, scales and biases
        grouped = (scale * queries).reshape(queries.shape[0], keys[0].shape[1], -1, queries.shape[3])
        if mx.default_device() == mx.cpu:  # where MLX computes this product in 16 bits 40 times slower
            grouped = grouped.astype(mx.float32)
        scores = product(grouped, *keys, transpose=True, group_size=size, bits=key_bits)
        if isinstance(mask, mx.array):  # of a batch: (B, 1, 1, S)
            least = mx.finfo(scores.dtype).min
            scores = mx.where(mask, scores, least) if mask.dtype == mx.bool_ else scores + mask
        weights = mx.softmax(scores, axis=-1, precise=True)
        output = product(weights, *values, transpose=False, group_size=size, bits=value_bits)
        output = output.reshape(*queries.shape[:3], -1).astype(queries.dtype)
    return output if own is None else own.restored(output)


def attend_in_parts(
    attention: Callable[..., mx.array], queries: mx.array, keys: mx.array, values: mx.array, size: int, *,
    mask: mx.array | str | None, **options: Any,
) -> mx.array:  # fmt: skip
    """Attend from the queries of the last L positions to the keys of all S, `size` queries at a time.

    Args:
        attention: a function of queries, keys, values, mask and the options.
        queries, keys, values, mask: as in `attend`.
        size: maximum number of queries in a part.
        options: passed to `attention`.
    """
    length, before = queries.shape[2], keys.shape[2] - queries.shape[2]
    if length <= size:
        return attention(queries, keys, values, mask=mask, **options)
    parts = []
    for start in range(0, length, size):
        end = min(start + size, length)
        part = mask
        seen = keys.shape[2]
        if isinstance(mask, str):
            seen = before + end  # no query sees a later key; "causal" aligns the last query with the last key
        elif mask is not None and mask.shape[-2] == length:
            part = mask[..., start:end, :]
        parts.append(attention(queries[:, :, start:end], keys[:, :, :seen], values[:, :, :seen], mask=part, **options))
    return mx.concatenate(parts, axis=2)
