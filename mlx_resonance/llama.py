"""The LLaMA model: mlx-lm's, with one rotary module for all layers that rotates queries and keys in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from .config import RopeConfig
from .kernels import Angles
from .rope import ResonanceRoPE


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's arguments, and the rotary embedding as config.json describes it in either style."""

    rope: RopeConfig = field(kw_only=True)

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> ModelArgs:
        """Read a whole config.json. Raises ValueError where its rope part is wrong."""
        return super().from_dict({**params, "rope": RopeConfig.from_hf(params)})

    def without_scaling(self) -> ModelArgs:
        """For mlx-lm's constructors, which make a rotary module of their own for every layer and know fewer types."""
        return replace(self, rope_scaling=None)  # type: ignore[call-arg]  # a field of mlx-lm's class


class Attention(llama.Attention):
    """Grouped-query attention; the rotary module is one for the whole model, the angles are the step's."""

    def __init__(self, args: ModelArgs, rope: ResonanceRoPE) -> None:
        super().__init__(args.without_scaling())
        self.rope = rope

    def __call__(self, x: mx.array, angles: Angles, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """Attend; x (B, L, hidden), result the same shape."""
        B, L, _ = x.shape

        def heads(projected: mx.array, count: int) -> mx.array:
            return projected.reshape(B, L, count, -1).transpose(0, 2, 1, 3)

        queries = heads(self.q_proj(x), self.n_heads)
        keys, values = heads(self.k_proj(x), self.n_kv_heads), heads(self.v_proj(x), self.n_kv_heads)
        queries, keys = self.rope.rotate(queries, keys, angles=angles)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        if L > 1 and hasattr(cache, "bits"):
            # mlx-lm's product with quantized keys holds all scores of a chunk, which are larger than a layer's keys and
            # values in 16 bits: those go to the fused attention instead.
            size, bits = cache.group_size, cache.bits
            keys, values = (mx.dequantize(w, s, b, group_size=size, bits=bits) for w, s, b in (keys, values))
            cache = None
        output = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))


class TransformerBlock(llama.TransformerBlock):
    """mlx-lm's block around our attention."""

    def __init__(self, args: ModelArgs, rope: ResonanceRoPE, use_sliding: bool = False) -> None:
        super().__init__(args.without_scaling(), use_sliding)
        self.self_attn = Attention(args, rope)

    def __call__(self, x: mx.array, angles: Angles, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """One layer; x (B, L, hidden), result the same shape."""
        h = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class LlamaModel(llama.LlamaModel):
    """Embedding, layers and final norm; computes a step's angles once for all layers."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args.without_scaling())
        by_length = args.rope.frequencies if args.rope.depends_on_length else args.rope.frequencies()
        self.rope = ResonanceRoPE(by_length, traditional=args.rope_traditional)
        self.layers = [TransformerBlock(args, self.rope, kind == "sliding_attention") for kind in args.layer_types]

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        """Token ids (B, L), or embeddings, to hidden states (B, L, hidden)."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.layers) if cache is None else cache
        full_cache = cache[self.fa_idx]
        masks = {False: create_attention_mask(h, full_cache)}
        if self.swa_idx is not None:
            masks[True] = create_attention_mask(h, cache[self.swa_idx], window_size=self.sliding_window)
        angles = self.rope.angles(h.shape[1], 0 if full_cache is None else full_cache.offset)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, angles, masks[layer.use_sliding], layer_cache)
        return self.norm(h)


class Model(llama.Model):
    """mlx-lm's LLaMA for causal language modelling with our rotary embedding; the same parameter names."""

    def __init__(self, args: ModelArgs) -> None:
        nn.Module.__init__(self)
        self.args = args
        self.model_type = args.model_type
        self.model = LlamaModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
