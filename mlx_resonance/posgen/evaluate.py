"""PosGen's measures: accuracy per position, with the true tokens before it (teacher-forced) and generating freely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .._mlx_lm import KVCache
from ..rope import ResonanceRoPE
from .data import tokens
from .model import Decoder
from .tasks import Int32Array, Task

ROWS_AT_ONCE = 50
SCORES_AT_ONCE = ROWS_AT_ONCE * 257**2  # attention scores of one head: of longer rows, fewer go through at a time

Counts = NDArray[np.int64]


def teacher_forced(model: Decoder, rope: ResonanceRoPE, rows: Int32Array, task: Task) -> Counts:
    """Count, per position, the rows in which the model predicts the right token from the true ones before it.

    Args:
        model: the decoder.
        rope: rotates queries and keys.
        rows: digits, shape (N, L).
        task: the rule that made them.

    Returns:
        int64, shape (L - near - far,): one count per predicted position.

    Source: sheryc/resonance_rope `src/models/decoder_module.py`, `generate_for_eval_test`.
    """
    start = task.seed_length
    return _count(rows, task, start, lambda ids: mx.argmax(model(ids[:, :-1], rope, start=start), axis=-1))


def generated(model: Decoder, rope: ResonanceRoPE, rows: Int32Array, task: Task, prompt_length: int) -> Counts:
    """Count, per position, the rows in which the model, continuing a prompt greedily, writes the right token.

    Args:
        model, rope, rows, task: as in `teacher_forced`.
        prompt_length: digits of the prompt, at least near + far.

    Returns:
        int64, shape (L - prompt_length,).
    """

    def write(ids: mx.array) -> mx.array:
        caches = [KVCache() for _ in model.layers]
        written, given = [], ids[:, : 1 + prompt_length]
        for offset in (0, *range(1 + prompt_length, ids.shape[1] - 1)):
            logits = model(given, rope, offset=offset, caches=caches, start=given.shape[1] - 1)
            given = mx.argmax(logits, axis=-1)
            written.append(given)
            mx.async_eval(given)
        return mx.concatenate(written, axis=1)

    return _count(rows, task, prompt_length, write)


def in_and_out(counts: Counts, rows: int, inside: int) -> tuple[float, float]:
    """Accuracy on positions within the training length and past it, in [0, 1]."""
    return float(counts[:inside].mean() / rows), float(counts[inside:].mean() / rows)


def _count(rows: Int32Array, task: Task, given: int, predict: Callable[[mx.array], mx.array]) -> Counts:
    """Count the right predictions of all digits after the first `given`; `predict` gets some rows of token ids."""
    ids = tokens(rows, task.modulus)
    size = max(1, min(ROWS_AT_ONCE, SCORES_AT_ONCE // ids.shape[1] ** 2))
    total: Any = 0
    for i in range(0, len(ids), size):
        some = mx.array(ids[i : i + size])
        total = total + mx.sum(predict(some) == some[:, given + 1 :], axis=0)
        mx.eval(total)
    return np.array(total).astype(np.int64)
