"""LongPPL (Fang et al. 2024, arXiv 2410.23771): which tokens of a document need its far beginning.

A key token is one that the evaluator predicts well with all that comes before it, and much worse with the last few
thousand tokens only. Perplexity over key tokens follows long-text tasks; over all tokens it does not.

Source: PKU-ML/LongPPL `longppl/longppl.py`, find_key_token. There, the tokens of the evaluator and of the model may
differ, and characters connect them; here they must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from .losses import token_losses

SHORT, STRIDE = 4096, 1024  # tokens before each token of a short window, and tokens that are scored in one
GAIN, LOSS = 2.0, 2.0  # nats: least loss that the far beginning saves, and what is left of it at most


def windows(length: int) -> list[tuple[int, int]]:
    """Where the short windows of a document begin, and how many of their last tokens each scores."""
    return [(begin, min(STRIDE, length - SHORT - begin)) for begin in range(0, length - SHORT, STRIDE)]


def tokens_to_read(length: int) -> int:
    """Number of tokens that `find_key_tokens` reads."""
    return length - 1 + sum(SHORT + scored - 1 for _, scored in windows(length))


def find_key_tokens(
    model: nn.Module, tokens: NDArray[np.int32], on_tokens: Callable[[int], None], **options: Any
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The key tokens of a document, and the losses of all of its tokens.

    Args:
        model: the evaluator.
        tokens: ids, start token included, shape (L,).
        on_tokens: called with the number of tokens of each chunk.
        options: `step` and `kv_bits` of `token_losses`.

    Returns:
        key: places in the losses, shape (K,).
        losses: in nats, of every token but the first, shape (L - 1,).
    """
    whole = token_losses(model, tokens[None], len(tokens) - 1, on_tokens=on_tokens, **options)[0]
    key = np.zeros(len(whole), bool)
    for begin, scored in windows(len(tokens)):
        end = begin + SHORT + scored
        short = token_losses(model, tokens[None, begin:end], scored, on_tokens=on_tokens, **options)[0]
        same = slice(end - scored - 1, end - 1)
        key[same] = (short - whole[same] > GAIN) & (whole[same] < LOSS)
    return np.flatnonzero(key), whole
