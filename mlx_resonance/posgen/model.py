"""PosGen's model: a T5-style decoder with rotary attention, for one seed or several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..rope import ResonanceRoPE


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder.

    Args:
        layers: number of layers, each of self-attention and a feed-forward.
        hidden_size: features of the residual stream.
        heads: number of attention heads.
        head_dim: features of a head, all of them rotated; even.
        intermediate_size: features inside the feed-forward.
        dropout: rate, on embeddings, attention weights, both residual branches, inside the feed-forward, and the end.
        train_feed_forward: whether the feed-forward is trained (the official code leaves it at its initial values).
    """

    layers: int
    hidden_size: int
    heads: int
    head_dim: int
    intermediate_size: int
    dropout: float = 0.0
    train_feed_forward: bool = True


class Dropout:
    """Dropout with one key per seed, so that seeds trained together drop what each would drop alone.

    Args:
        rate: the probability to drop.
        keys: shape (S, 2), uint32.
    """

    def __init__(self, rate: float, keys: mx.array) -> None:
        self.kept = 1 - rate
        self.keys = keys

    def __call__(self, x: mx.array) -> mx.array:
        """Drop from x, shape (S, …); every call drops anew."""
        self.keys = self.keys + mx.array([0, 1], dtype=mx.uint32)
        draws = [mx.random.bernoulli(self.kept, x.shape[1:], key) for key in self.keys]
        return mx.where(mx.stack(draws), x * (1 / self.kept), 0)


def keep_all(x: mx.array) -> mx.array:
    """In place of `Dropout`, where nothing is dropped."""
    return x


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight per seed, shape (S, D)."""

    def __init__(self, seeds: int, dims: int) -> None:
        super().__init__()
        self.weight = mx.ones((seeds, dims))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, 1e-6) * self.weight[:, None, None]


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x of shape (S, B, L, D) times a weight per seed, (S, D, out)."""
    seeds, batch, length, dims = x.shape
    return (x.reshape(seeds, batch * length, dims) @ weight).reshape(seeds, batch, length, -1)


class Attention(nn.Module):
    """Causal self-attention without 1/√d: T5's initial values make up for it."""

    def __init__(self, config: ModelConfig, keys: list[mx.array]) -> None:
        super().__init__()
        dims, inner = config.hidden_size, config.heads * config.head_dim
        self.q = _normal(keys, 0, (dims, inner), (dims * config.head_dim) ** -0.5)
        self.k = _normal(keys, 1, (dims, inner), dims**-0.5)
        self.v = _normal(keys, 2, (dims, inner), dims**-0.5)
        self.o = _normal(keys, 3, (inner, dims), inner**-0.5)
        self.heads = config.heads

    def __call__(self, x: mx.array, rope: ResonanceRoPE, angles: Any, mask: Any, drop: Any, cache: Any) -> mx.array:
        seeds, batch, length, _ = x.shape

        def heads(weight: mx.array) -> mx.array:
            return linear(x, weight).reshape(seeds * batch, length, self.heads, -1).transpose(0, 2, 1, 3)

        values = heads(self.v)
        queries, keys = rope.rotate(heads(self.q), heads(self.k), angles=angles)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        scores = queries @ keys.swapaxes(-1, -2)
        if mask is not None:
            scores = scores + mask
        weights = mx.softmax(scores, axis=-1)
        weights = drop(weights.reshape(seeds, -1, *weights.shape[1:])).reshape(weights.shape)
        merged = (weights @ values).transpose(0, 2, 1, 3).reshape(seeds, batch, length, -1)
        return linear(merged, self.o)


class FeedForward(nn.Module):
    """Two layers with ReLU, no bias."""

    def __init__(self, config: ModelConfig, keys: list[mx.array]) -> None:
        super().__init__()
        dims, inner = config.hidden_size, config.intermediate_size
        self.wi = _normal(keys, 4, (dims, inner), dims**-0.5)
        self.wo = _normal(keys, 5, (inner, dims), inner**-0.5)

    def __call__(self, x: mx.array, drop: Any) -> mx.array:
        return linear(drop(nn.relu(linear(x, self.wi))), self.wo)


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each branch added to its input."""

    def __init__(self, config: ModelConfig, keys: list[mx.array]) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(len(keys), config.hidden_size)
        self.attention = Attention(config, keys)
        self.feed_forward_norm = RMSNorm(len(keys), config.hidden_size)
        self.feed_forward = FeedForward(config, keys)

    def __call__(self, x: mx.array, rope: ResonanceRoPE, angles: Any, mask: Any, drop: Any, cache: Any) -> mx.array:
        x = x + drop(self.attention(self.attention_norm(x), rope, angles, mask, drop, cache))
        return x + drop(self.feed_forward(self.feed_forward_norm(x), drop))


class Decoder(nn.Module):
    """S decoders of one shape, each with weights of its own: every parameter has a first axis of length S.

    Args:
        config: the shape.
        vocabulary: number of token ids.
        seeds: one per decoder; its initial values depend on its seed alone.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, seeds: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        keys = [mx.random.split(mx.random.key(seed), config.layers + 1) for seed in seeds]
        self.embedding = _normal([key[0] for key in keys], 0, (vocabulary, config.hidden_size), 1.0)
        self.layers = [Block(config, [key[i + 1] for key in keys]) for i in range(config.layers)]
        self.norm = RMSNorm(len(seeds), config.hidden_size)
        if not config.train_feed_forward:
            for layer in self.layers:
                layer.feed_forward.freeze()
                layer.feed_forward_norm.freeze()

    def __call__(
        self,
        tokens: mx.array,
        rope: ResonanceRoPE,
        offset: int = 0,
        caches: Sequence[Any] | None = None,
        dropout_keys: mx.array | None = None,
        start: int = 0,
    ) -> mx.array:
        """Logits of the next token.

        Args:
            tokens: shape (S, B, L).
            rope: rotates queries and keys.
            offset: position of the first token.
            caches: one mlx-lm cache per layer, for generation.
            dropout_keys: one key per seed, shape (S, 2), in training; None drops nothing.
            start: the first of the L positions whose logits are wanted.

        Returns:
            Shape (S, B, L - start, vocabulary).
        """
        seeds, _, length = tokens.shape
        drop: Any = keep_all
        if dropout_keys is not None and self.config.dropout > 0:
            drop = Dropout(self.config.dropout, dropout_keys)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length) if length > 1 else None
        angles = rope.angles(length, offset)
        x = drop(self.embedding[mx.arange(seeds)[:, None, None], tokens])
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, rope, angles, mask, drop, cache)
        x = drop(self.norm(x[:, :, start:])) * self.config.hidden_size**-0.5
        return linear(x, self.embedding.swapaxes(-1, -2))


def _normal(keys: list[mx.array], index: int, shape: tuple[int, ...], deviation: float) -> mx.array:
    """One normal draw per seed, shape (S, …); `index` tells the parameters of a layer apart."""
    return mx.stack([mx.random.normal(shape, key=mx.random.split(key, 8)[index]) * deviation for key in keys])
