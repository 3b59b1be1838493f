"""The decoder that PosGen's official code trains, in PyTorch: the other side of the model's tests.

Written from the description of sheryc/resonance_rope `src/models/` and of T5 (arXiv 1910.10683), not from ours, and it
imports nothing of ours: (L, L) scores, cosines and sines from angles in float64.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tables(theta: Any, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines times the attention scale, each (L, pairs), from float64 angles of that shape."""
    theta = np.asarray(theta, dtype=np.float64)
    return torch.tensor(np.cos(theta) * scale).float(), torch.tensor(np.sin(theta) * scale).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring features (2i, 2i + 1) of x, shape (B, H, L, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Norm(nn.Module):
    """Root-mean-square norm: no mean, no bias."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class Layer(nn.Module):
    """Self-attention, then a feed-forward, each after a norm and added to its input."""

    def __init__(self, dims: int, heads: int, head_dim: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = Norm(dims), Norm(dims)
        self.q, self.k, self.v = (nn.Linear(dims, heads * head_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, dims, bias=False)
        self.wi, self.wo = nn.Linear(dims, inner, bias=False), nn.Linear(inner, dims, bias=False)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, dropout: float) -> Tensor:
        q, k, v = (
            F.linear(x, w.weight).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = F.softmax((q @ k.transpose(-1, -2)).masked_fill(future, -torch.inf), dim=-1)
        mixed = F.dropout(weights, dropout) @ v
        return F.linear(mixed.transpose(1, 2).flatten(2), self.o.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dropout: float) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), cos, sin, dropout), dropout)
        hidden = F.dropout(F.relu(F.linear(self.feed_forward_norm(x), self.wi.weight)), dropout)
        return x + F.dropout(F.linear(hidden, self.wo.weight), dropout)


class Decoder(nn.Module):
    """The decoder of a T5 without cross-attention and position bias, its output the embedding transposed.

    Args:
        shape: layers, hidden_size, heads, head_dim, intermediate_size, dropout and train_feed_forward.
        vocabulary: number of token ids.
    """

    def __init__(self, shape: Any, vocabulary: int) -> None:
        super().__init__()
        self.rate = shape.dropout
        self.embedding = nn.Embedding(vocabulary, shape.hidden_size)
        sizes = (shape.hidden_size, shape.heads, shape.head_dim, shape.intermediate_size)
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden_size)
        if not shape.train_feed_forward:
            for layer in self.layers:
                for part in (layer.feed_forward_norm, layer.wi, layer.wo):
                    part.requires_grad_(False)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, start: int = 0) -> Tensor:
        """Logits after tokens of shape (B, L), from position `start` on; dropout in training mode."""
        dropout = self.rate if self.training else 0.0
        x = F.dropout(F.embedding(tokens, self.embedding.weight), dropout)
        for layer in self.layers:
            x = layer(x, cos, sin, dropout)
        x = F.dropout(self.norm(x[:, start:]), dropout)
        return F.linear(x * x.shape[-1] ** -0.5, self.embedding.weight)


def translated(arrays: Iterable[tuple[str, Any]]) -> Mapping[str, Tensor]:
    """Our parameters, or their gradients, under the names and in the layout of this file's `Decoder`."""
    result = {}
    for name, array in arrays:
        tensor = torch.tensor(np.array(array))
        name = name.replace("attention.", "").replace("feed_forward.", "").removesuffix(".weight")
        if name.rpartition(".")[-1] in ("q", "k", "v", "o", "wi", "wo"):
            tensor = tensor.T.contiguous()
        result[f"{name}.weight"] = tensor
    return result
