"""The losses of tokens: windows are read in chunks through a KV cache, the head is computed for scored tokens only."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..attention import next_token_logits
from ..generation.cache import make_cache
from ..generation.kv_format import KVBits
from ..generation.prefill import STEP, Pace
from ..rope import expect

LOGITS = 2**24  # numbers that the head computes at once


def token_losses(
    model: nn.Module,
    rows: NDArray[np.int32],
    scored: int,
    *,
    step: int = STEP,
    kv_bits: KVBits = None,
    on_tokens: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """The loss of each of the last tokens of some windows, given all tokens before it in its window.

    Chunks go through a KV cache, so that attention is never computed over a whole window at once; the head is computed
    for the scored tokens only, a few at a time.

    Args:
        model: from `load`.
        rows: token ids, shape (B, L), start token included.
        scored: number of tokens at the end of each row, at most L - 1.
        step: maximum number of tokens of a chunk, over all rows.
        kv_bits: format of the KV cache, as in `KVFormat.of`.
        on_tokens: called with the number of tokens of each chunk.

    Returns:
        Negative log-likelihoods in nats, shape (B, scored).
    """
    batch, length = rows.shape
    pace = Pace(len(model.layers), max(1, step // batch))
    expect(model, length)  # rotate the keys as a pass over the whole window would
    tokens, cache = mx.array(rows), make_cache(model, length, kv_bits)
    parts: list[NDArray[np.float32]] = []
    done, first = 0, length - 1 - scored  # the token at `first` predicts the first scored one
    while done < length - 1:
        end = done + min(pace.size(done), length - 1 - done)
        with pace.reading(end - done, done):
            hidden = model.model(tokens[:, done:end], cache=cache)
            mx.eval([layer.state for layer in cache])
        if end > first:
            start = max(done, first)
            parts += _losses(model, hidden[:, start - done :], tokens[:, start + 1 : end + 1])
        done = end
        mx.clear_cache()
        if on_tokens is not None:
            on_tokens(batch * hidden.shape[1])
    expect(model, 0)
    return np.concatenate(parts, axis=1)


def _losses(model: nn.Module, hidden: mx.array, targets: mx.array) -> list[NDArray[np.float32]]:
    """Losses of targets (B, L), given the hidden states (B, L, hidden) of the tokens before them; in parts (B, …)."""
    size = max(1, LOGITS // (model.args.vocab_size * hidden.shape[0]))
    losses = []
    for start in range(0, hidden.shape[1], size):
        logits = next_token_logits(model, hidden[:, start : start + size]).astype(mx.float32)
        right = mx.take_along_axis(logits, targets[:, start : start + size, None], axis=-1)[..., 0]
        losses.append(np.array(mx.logsumexp(logits, axis=-1) - right))
    return losses
