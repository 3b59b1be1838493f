"""The one attention that is put into mlx-lm's model files: exact angles, once per step, in launches of bounded size."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from .rope import ResonanceRoPE
from .rope_config import RopeConfig

# The model files of mlx-lm whose attention is q_proj, k_proj, v_proj, q_norm and k_norm where there are any, rope,
# o_proj; and which other file's attention they use.
ADAPTED_FILES = {"llama": "llama", "smollm3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "granite": "granite"}
# Queries times keys of one launch of attention, for each head: what macOS lets a GPU work at without a break. 2048
# queries reach it at 65 k keys.
BUDGET = 2**27


def set_rope(model: nn.Module, rope: RopeConfig) -> None:
    """Have a model of `ADAPTED_FILES` rotate as `rope` says, whatever it was built with. Its weights stay.

    All layers share one `ResonanceRoPE`; layers without rope (SmolLM 3) stay so. The classes of mlx-lm's file are
    changed once; their models that were not given to this function work as before.
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


def next_token_logits(model: nn.Module, hidden: mx.array) -> mx.array:
    """Logits (…, vocabulary) of hidden states (…, hidden), as a call of the model computes them after its layers."""
    args: Any = model.args
    logits = model.model.embed_tokens.as_linear(hidden) if args.tie_word_embeddings else model.lm_head(hidden)
    return logits / args.logits_scaling if hasattr(args, "logits_scaling") else logits  # Granite's


def adapt(model: nn.Module) -> None:
    """Put the attention into the classes that a model of `ADAPTED_FILES` is made of."""
    for kind, wrap in ((type(model.layers[0].self_attn), _attention), (type(model.model), _with_angles)):
        if not hasattr(kind.__call__, "of_mlx_lm"):
            call = wrap(kind.__call__)
            call.of_mlx_lm = kind.__call__  # type: ignore[attr-defined]
            kind.__call__ = call


def _with_angles(forward: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The stack of layers, with the angles of a step computed once for all of them."""

    @wraps(forward)
    def call(self: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        rope = self.get("rope")
        if rope is None:
            return forward(self, inputs, cache, *args, **kwargs)
        embeddings = args[0] if args else kwargs.get("input_embeddings")
        length = (inputs if embeddings is None else embeddings).shape[1]
        offset = next((layer.offset for layer in cache or () if layer is not None), 0)
        with rope.sharing(length, offset):
            return forward(self, inputs, cache, *args, **kwargs)

    return call


def _attention(of_mlx_lm: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Grouped-query attention: queries and keys are rotated in one call, by the angles of the step."""

    @wraps(of_mlx_lm)
    def call(self: Any, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        if not getattr(self, "_adapted", False):
            return of_mlx_lm(self, x, mask, cache)
        rope = self.rope
        B, L, _ = x.shape
        queries = self.q_proj(x).reshape(B, L, self.n_heads, -1)
        keys = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1)
        values = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = queries.transpose(0, 2, 1, 3), keys.transpose(0, 2, 1, 3)
        if isinstance(rope, ResonanceRoPE):
            queries, keys = rope.rotate(queries, keys, offset=0 if cache is None else cache.offset, angles=rope.shared)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if L > 1 and hasattr(cache, "bits"):
            # mlx-lm's product with quantized keys holds all scores of a chunk, which are larger than a layer's keys and
            # values in 16 bits: those go to the fused attention instead.
            size, bits = cache.group_size, cache.bits
            keys, values = (mx.dequantize(w, s, b, group_size=size, bits=bits) for w, s, b in (keys, values))
            cache = None
        output = attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))

    return call


def attend(
    queries: mx.array, keys: Any, values: Any, *, cache: Any, scale: float, mask: mx.array | str | None
) -> mx.array:
    """mlx-lm's attention, some queries at a time where all of them would take the GPU too long: see `BUDGET`.

    Args:
        queries: (B, H, L, D).
        keys, values: (B, H_kv, S, D); as the cache gives them.
        cache: of the layer; None for keys that are not quantized.
        scale: of the scores.
        mask: "causal", None, or an array that broadcasts to (B, H, L, S).

    Returns:
        Shape (B, H, L, D).
    """
    length = queries.shape[2]
    if length == 1:
        return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)
    size = max(1, BUDGET // (queries.shape[0] * keys.shape[2]))
    return attend_in_parts(
        scaled_dot_product_attention, queries, keys, values, size, cache=cache, scale=scale, mask=mask
    )


def attend_in_parts(
    attention: Callable[..., mx.array], queries: mx.array, keys: mx.array, values: mx.array, size: int, *,
    mask: mx.array | str | None, **options: Any,
) -> mx.array:  # fmt: skip
    """An attention of L queries to the S keys up to the last of them, `size` queries at a time.

    Args:
        attention: takes queries, keys, values, mask and the options.
        queries, keys, values, mask: as of `attend`.
        size: most queries of a part.
        options: passed on.
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
            seen = before + end  # no query sees a key after it; "causal" lines up the last of both
        elif mask is not None and mask.shape[-2] == length:
            part = mask[..., start:end, :]
        parts.append(attention(queries[:, :, start:end], keys[:, :, :seen], values[:, :, :seen], mask=part, **options))
    return mx.concatenate(parts, axis=2)
