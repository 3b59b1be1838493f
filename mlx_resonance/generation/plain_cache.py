"""mlx-lm's KV cache, updated by calls that take the CPU less time: a quarter of a decode step's was spent there."""

from __future__ import annotations

import mlx.core as mx

from .._mlx_lm import KVCache
from .far_keys import FarKeys


class PlainCache(KVCache):  # type: ignore[misc]  # mypy does not follow mlx-lm
    """Keys and values of one layer in the model's type, each (B, H, S, D)."""

    offset: int

    def __init__(self) -> None:
        super().__init__()
        self.far = FarKeys()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, (B, H, L, D) each. Returns all of them."""
        end = self.offset + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            return super().update_and_fetch(keys, values)  # it grows
        # [..., a:b, :] would be the same, but MLX takes longer to read it than to carry it out.
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def dense_keys(self, first: int, end: int, like: mx.Dtype) -> mx.array:
        """Keys in a range of tokens, in the model's type."""
        return self.keys[:, :, first:end]

    def stored_keys(self, keys: mx.array) -> mx.array:
        """Keys as this cache stores them."""
        return keys

    def trim(self, n: int) -> int:
        """Remove the last tokens. Returns their number."""
        trimmed: int = super().trim(n)
        self.far.trim(self.offset)
        return trimmed
