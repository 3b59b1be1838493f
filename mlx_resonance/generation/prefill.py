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
    before: int = 0,
    prompt_progress_callback: Progress | None = None,
) -> None:
    """Append the keys and values of all tokens but the last to the caches.

    An interrupt takes effect after the chunk that is being read. After it, as after an error, the caches hold whole
    chunks.

    Args:
        model: from `load`.
        tokens: the whole prompt.
        cache: one per layer; it may hold the tokens of an earlier text, then the first tokens of the prompt.
        step: maximum number of tokens in a chunk.
        budget: maximum of queries × keys in a chunk.
        before: number of tokens of an earlier text in the cache.
        prompt_progress_callback: called with the number of prompt tokens done and their total.
    """
    done, total = cache[0].offset - before, len(tokens)
    if prompt_progress_callback is not None:
        prompt_progress_callback(done, total)
    try:
        while done < total - 1:
            size = min(chunk_size(before + done, step, budget), total - 1 - done)
            model(mx.array(list(tokens[done : done + size]))[None], cache=cache)
            done += size  # before eval: an interrupt is raised only after eval has returned
            mx.eval([layer.state for layer in cache])  # not the logits: this skips the head
            mx.clear_cache()
            if prompt_progress_callback is not None:
                prompt_progress_callback(done, total)
    except BaseException:
        for layer in cache:  # some may have counted a chunk that the others have not seen
            layer.trim(layer.offset - before - done)
        raise
