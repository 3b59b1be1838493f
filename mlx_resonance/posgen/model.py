"""PosGen's model: a T5-style decoder with rotary attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..rope import ResonanceRoPE
from .data import SPECIAL
from .settings import ModelConfig

EPSILON = 1e-6  # of the norms
LINE, CIRCLE = 0.75, 1.5  # size of the ordered parts of the digits' embeddings, beside 1 for the random part


class Dropout:
    """Dropout whose draws depend on its key and the number of the call alone.

    Args:
        rate: the probability to drop.
        key: shape (2,), uint32.
    """

    def __init__(self, rate: float, key: mx.array) -> None:
        self.kept = 1 - rate
        self.key = key

    def __call__(self, x: mx.array) -> mx.array:
        """Drop parts of x, other ones at every call."""
        self.key = self.key + mx.array([0, 1], dtype=mx.uint32)
        return mx.where(mx.random.bernoulli(self.kept, x.shape, self.key), x * (1 / self.kept), 0)


class Attention(nn.Module):
    """Causal self-attention without 1/√d: T5's initial values make up for it."""

    def __init__(self, config: ModelConfig, key: mx.array) -> None:
        super().__init__()
        dims, inner = config.hidden_size, config.heads * config.head_dim
        self.q = _normal(key, 0, (dims, inner), (dims * config.head_dim) ** -0.5)
        self.k = _normal(key, 1, (dims, inner), dims**-0.5)
        self.v = _normal(key, 2, (dims, inner), dims**-0.5)
        self.o = _normal(key, 3, (inner, dims), inner**-0.5)
        self.heads = config.heads

    def __call__(self, x: mx.array, rope: ResonanceRoPE, angles: Any, mask: Any, drop: Any, cache: Any) -> mx.array:
        batch, length, _ = x.shape

        def heads(weight: mx.array) -> mx.array:
            return (x @ weight).reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)

        values = heads(self.v)
        queries, keys = rope.rotate(heads(self.q), heads(self.k), angles=angles)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        scores = queries @ keys.swapaxes(-1, -2)
        if mask is not None:
            scores = scores + mask
        weights = drop(mx.softmax(scores, axis=-1))
        return (weights @ values).transpose(0, 2, 1, 3).reshape(batch, length, -1) @ self.o


class FeedForward(nn.Module):
    """Two layers with ReLU, no bias."""

    def __init__(self, config: ModelConfig, key: mx.array) -> None:
        super().__init__()
        dims, inner = config.hidden_size, config.intermediate_size
        self.wi = _normal(key, 4, (dims, inner), dims**-0.5)
        self.wo = _normal(key, 5, (inner, dims), inner**-0.5)

    def __call__(self, x: mx.array, drop: Any) -> mx.array:
        return drop(nn.relu(x @ self.wi)) @ self.wo


class Block(nn.Module):
    """Norm, attention, norm, feed-forward; each branch is added to its input."""

    def __init__(self, config: ModelConfig, key: mx.array) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=EPSILON)
        self.attention = Attention(config, key)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=EPSILON)
        self.feed_forward = FeedForward(config, key)

    def __call__(self, x: mx.array, rope: ResonanceRoPE, angles: Any, mask: Any, drop: Any, cache: Any) -> mx.array:
        x = x + drop(self.attention(self.attention_norm(x), rope, angles, mask, drop, cache))
        return x + drop(self.feed_forward(self.feed_forward_norm(x), drop))


class Decoder(nn.Module):
    """The decoder of a T5 with rotary self-attention; its output layer is the embedding, transposed.

    Args:
        config: the shape.
        vocabulary: number of token ids.
        seed: decides the initial values.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.config = config
        keys = mx.random.split(mx.random.key(seed), config.layers + 1)
        self.embedding = _embedding(config, vocabulary, keys[0])
        self.layers = [Block(config, keys[i + 1]) for i in range(config.layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=EPSILON)
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
        dropout_key: mx.array | None = None,
        start: int = 0,
    ) -> mx.array:
        """Logits of the next token.

        Args:
            tokens: shape (B, L).
            rope: rotates queries and keys.
            offset: position of the first token.
            caches: one mlx-lm cache per layer, for generation.
            dropout_key: shape (2,), in training; None drops nothing.
            start: the first of the L positions to compute logits for.

        Returns:
            Shape (B, L - start, vocabulary).
        """
        length = tokens.shape[1]
        drop: Any = nn.Identity()
        if dropout_key is not None and self.config.dropout > 0:
            drop = Dropout(self.config.dropout, dropout_key)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length) if length > 1 else None
        angles = rope.angles(length, offset)
        x = drop(self.embedding[tokens])
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, rope, angles, mask, drop, cache)
        x = drop(self.norm(x[:, start:])) * self.config.hidden_size**-0.5
        return x @ self.embedding.T


def _embedding(config: ModelConfig, vocabulary: int, key: mx.array) -> mx.array:
    """The initial embedding, shape (vocabulary, hidden_size): random, with as much order of the digits as wanted.

    The order is a place on a line, whose sums are sums of digits, and one on a circle, where the modulus is 0.
    """
    shape = vocabulary, config.hidden_size
    random = _normal(key, 0, shape, 1.0)
    if not config.ordered:
        return random
    digits = np.arange(vocabulary - SPECIAL)
    turns = 2 * np.pi * digits / len(digits)
    line = LINE * (digits - digits.mean()) / digits.std()
    places = np.stack([line, CIRCLE * np.cos(turns), CIRCLE * np.sin(turns)], axis=1)
    order = mx.array(places, dtype=mx.float32) @ _normal(key, 1, (3, config.hidden_size), 1.0)
    mixed = config.ordered * order + (1 - config.ordered) * random[: len(digits)]
    return mx.concatenate([mixed, random[len(digits) :]])


def _normal(key: mx.array, index: int, shape: tuple[int, ...], deviation: float) -> mx.array:
    """A normal draw; `index` tells the parameters of a layer apart."""
    return mx.random.normal(shape, key=mx.random.split(key, 8)[index]) * deviation
