"""PosGen's measures: accuracy per position, with the true tokens before it (teacher-forced) and generating freely."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from ..rope import ResonanceRoPE
from .data import tokens
from .model import Decoder
from .tasks import Int32Array, Task

ROWS_AT_ONCE = 50
SCORES_AT_ONCE = ROWS_AT_ONCE * 257**2  # of one head and decoder: longer rows go fewer at a time

Counts = NDArray[np.int64]


def teacher_forced(model: Decoder, rope: ResonanceRoPE, rows: Int32Array, task: Task) -> Counts:
    """How many rows have the right token predicted, given all tokens before it.

    Args:
        model: S decoders.
        rope: rotates queries and keys.
        rows: digits, shape (N, L).
        task: the rule that made them.

    Returns:
        int64, shape (S, L - near - far): one count per decoder and predicted position.

    Source: sheryc/resonance_rope `src/models/decoder_module.py`, `generate_for_eval_test`.
    """
    start = task.seed_length
    total: Any = 0
    for ids in _chunks(model, rows, task.modulus):
        predicted = mx.argmax(model(ids[..., :-1], rope, start=start), axis=-1)
        total = total + mx.sum(predicted == ids[..., start + 1 :], axis=1)
        mx.eval(total)
    return np.array(total).astype(np.int64)


def generated(model: Decoder, rope: ResonanceRoPE, rows: Int32Array, task: Task, prompt_length: int) -> Counts:
    """How many rows have the right token, when every token after a prompt is the model's own most likely one.

    Args:
        model, rope, rows, task: as in `teacher_forced`.
        prompt_length: digits that are given, at least near + far.

    Returns:
        int64, shape (S, L - prompt_length).
    """
    total: Any = 0
    for ids in _chunks(model, rows, task.modulus):
        caches = [KVCache() for _ in model.layers]
        written, given = [], ids[..., : 1 + prompt_length]
        for offset in (0, *range(1 + prompt_length, ids.shape[-1] - 1)):
            logits = model(given, rope, offset=offset, caches=caches, start=given.shape[-1] - 1)
            given = mx.argmax(logits, axis=-1)
            written.append(given)
            mx.async_eval(given)
        total = total + mx.sum(mx.concatenate(written, axis=-1) == ids[..., 1 + prompt_length :], axis=1)
        mx.eval(total)
    return np.array(total).astype(np.int64)


def in_and_out(counts: Counts, rows: int, inside: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy on positions within the training length and past it, each of shape (S,), in [0, 1]."""
    return counts[:, :inside].mean(axis=1) / rows, counts[:, inside:].mean(axis=1) / rows


def _chunks(model: Decoder, rows: Int32Array, modulus: int) -> Any:
    ids = tokens(rows, modulus)
    seeds = model.norm.weight.shape[0]
    size = max(1, min(ROWS_AT_ONCE, SCORES_AT_ONCE // ids.shape[1] ** 2))
    for i in range(0, len(ids), size):
        chunk = ids[i : i + size]
        yield mx.array(np.broadcast_to(chunk, (seeds, *chunk.shape)))
