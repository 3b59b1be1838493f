"""Reading a prompt in chunks that shrink as the keys grow, so that no launch of attention takes too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attention import BUDGET

STEP = 2048  # tokens
PREFILL_BATCH = 8  # prompts of a batch read at once

Progress = Callable[[int, int], None]


def chunk_size(done: int, step: int = STEP, budget: int = BUDGET) -> int:
    """How many tokens to read next, after `done`: at most `step`, with queries × keys at most `budget`."""
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
    """Append the keys and values of all tokens but the last to the caches.

    An interrupt takes effect after the chunk that is being read. After it, as after an error, the caches hold whole
    chunks.

    Args:
        model: from `load`.
        tokens: the whole prompt.
        cache: one per layer; its offset says how many of the tokens it has.
        step: maximum number of tokens in a chunk.
        budget: maximum of queries × keys in a chunk.
        progress: called with the number of tokens done and their total.
    """
    done, total = cache[0].offset, len(tokens)
    if progress is not None:
        progress(done, total)
    try:
        while done < total - 1:
            size = min(chunk_size(done, step, budget), total - 1 - done)
            model(mx.array(list(tokens[done : done + size]))[None], cache=cache)
            done += size  # before eval: an interrupt is raised only after eval has returned
            mx.eval([layer.state for layer in cache])  # not the logits: this skips the head
            mx.clear_cache()
            if progress is not None:
                progress(done, total)
    except BaseException:
        for layer in cache:  # some may have counted a chunk that the others have not seen
            layer.trim(layer.offset - done)
        raise
