"""Reading a prompt: in chunks that shrink as the keys grow, so that no launch of attention takes too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attention import BUDGET

STEP = 2048  # tokens
PREFILL_BATCH = 8  # prompts of a batch that are read at once

Progress = Callable[[int, int], None]


def chunk_size(done: int, step: int = STEP, budget: int = BUDGET) -> int:
    """How many tokens to read at once, after `done`: at most `step`, and queries × keys at most `budget`."""
    return max(1, min(step, (math.isqrt(done * done + 4 * budget) - done) // 2))


def prefill(
    model: nn.Module,
    tokens: Sequence[int],
    cache: list[Any],
    *,
    step: int = STEP,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> None:
    """Put the keys and values of all tokens but the last into the caches, after those that they have.

    An interrupt ends it after the chunk that is being read; the caches then hold whole chunks. So they do after an
    error.

    Args:
        model: from `load`.
        tokens: of the whole prompt.
        cache: of each layer; its offset says how many of the tokens it has.
        step: maximum number of tokens of a chunk.
        budget: maximum of queries times keys of a chunk.
        progress: called with the tokens done and in all.
    """
    done, total = cache[0].offset, len(tokens)
    if progress is not None:
        progress(done, total)
    try:
        while done < total - 1:
            size = min(chunk_size(done, step, budget), total - 1 - done)
            model(mx.array(list(tokens[done : done + size]))[None], cache=cache)
            done += size  # now: an interrupt is raised only when eval has come back
            mx.eval([layer.state for layer in cache])  # not the logits: the head is left out
            mx.clear_cache()
            if progress is not None:
                progress(done, total)
    except BaseException:
        for layer in cache:  # some may have counted a chunk that the others have not seen
            layer.trim(layer.offset - done)
        raise
