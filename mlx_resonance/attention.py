"""The attention patched into mlx-lm's models: queries and keys rotated by exact angles, computed once per step."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import attend
from .rope import ResonanceRoPE
from .rope_config import RopeConfig

# mlx-lm's model files whose attention consists of q_proj, k_proj, v_proj, optional q_norm and k_norm, rope and o_proj;
# each maps to the file whose attention it uses.
ADAPTED_FILES = {"llama": "llama", "smollm3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "granite": "granite"}


def set_rope(model: nn.Module, rope: RopeConfig) -> None:
    """Make a model from `ADAPTED_FILES` rotate as `rope` says, however it was built. Its weights do not change.

    All layers share one `ResonanceRoPE`; layers without rope (SmolLM 3) stay without. The classes in mlx-lm's file are
    patched once; their models that were not passed to this function work as before.
    """
    adapt(model)
    frequencies = rope.frequencies if rope.depends_on_length else rope.frequencies()
    module = ResonanceRoPE(frequencies, bool(getattr(model.args, "rope_traditional", False)), rope.positions)
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
        rope, unrotated, offset = self.get("rope"), queries, 0 if cache is None else cache.offset
        rotates = isinstance(rope, ResonanceRoPE)
        if rotates:
            queries, keys = rope.rotate(queries, keys, offset, rope.shared)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if rotates and rope.positions is not None and attend.reaches_past(rope.positions, offset, L, mask):
            options: dict[str, Any] = {"rope": rope, "cache": cache, "offset": offset, "scale": self.scale}
            output = attend.attend_mapped(unrotated, queries, keys, values, **options).transpose(0, 2, 1, 3)
        elif hasattr(cache, "group_size"):
            output = attend.attend_quantized(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
            output = output if L == 1 else output.transpose(0, 2, 1, 3)
        elif L == 1 and mask is None:
            output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        else:
            output = attend.attend(queries, keys, values, scale=self.scale, mask=mask).transpose(0, 2, 1, 3)
        return part("o_proj")(output.reshape(B, L, -1))

    return call
