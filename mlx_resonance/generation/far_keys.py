"""Keys of a KV cache as they look from far away: moved to the positions that a position map gives them, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

Move = Callable[[mx.array, int, int], mx.array]  # keys (B, H, L, D) in their own positions, their range, to moved ones


class FarKeys:
    """The first keys of a cache, moved, in the cache's own format.

    A key is moved once, from the form in which the cache has it, and not again until the form changes. All that the
    cache holds are moved at a time, those that are still near included: a text that grows seldom waits for it.
    """

    def __init__(self) -> None:
        self.held = 0  # tokens
        self._form = 0
        self._arrays: Any = None  # as the cache has its keys: with room for more tokens than are held

    def fetch(self, cache: Any, form: int, count: int, move: Move, like: mx.Dtype) -> Any:
        """The first keys, moved, as the cache would return them.

        Args:
            cache: has `dense_keys`, `stored_keys`, `offset` and `keys`.
            form: names the positions that they are moved to; a new form discards the keys of the old one.
            count: number of keys, at most those that the cache holds.
            move: moves keys.
            like: the model's type.
        """
        if form != self._form:
            self.held, self._form = 0, form
        if self.held < count:
            self._extend(cache, move, like)
        return tree_map(lambda x: x[:, :, :count], self._arrays)

    def _extend(self, cache: Any, move: Move, like: mx.Dtype) -> None:
        first, end = self.held, cache.offset
        new = cache.stored_keys(move(cache.dense_keys(first, end, like), first, end))
        room = tree_map(lambda x: x.shape[2], cache.keys)
        if self._arrays is None or tree_map(lambda x: x.shape[2], self._arrays) != room:
            made = tree_map(lambda x, size: mx.zeros((*x.shape[:2], size, x.shape[3]), x.dtype), new, room)
            if first:
                made = tree_map(lambda x, old: _put(x, old[:, :, :first], 0), made, self._arrays)
            self._arrays = made
        self._arrays = tree_map(lambda x, part: _put(x, part, first), self._arrays, new)
        self.held = end
        mx.async_eval(self._arrays)  # a layer whose output nobody needs would keep them waiting

    def trim(self, tokens: int) -> None:
        """Keep the first `tokens` at most."""
        self.held = min(self.held, tokens)


def _put(target: mx.array, part: mx.array, first: int) -> mx.array:
    target[:, :, first : first + part.shape[2]] = part
    return target
