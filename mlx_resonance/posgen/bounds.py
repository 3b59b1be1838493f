"""What PosGen's tokens give away: the accuracy of a constant guess, and of the best one without far tokens."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .data import make_table
from .tasks import KINDS, Int32Array, Task

TOKENS = 800_000  # of the rows: two thirds to fit on, one third to test on


@lru_cache(maxsize=64)
def bounds(task: Task, length: int) -> dict[str, dict[str, float]]:
    """Measured accuracies of two predictors, by kind of token.

    Both are fitted by counting on random sequences and tested on others, or fitted to all sequences where these are
    few; all positions of a kind are pooled.

    Args:
        task: the rule.
        length: tokens of a sequence.

    Returns:
        By kind (those of `Task.kinds` that occur): `chance`, the accuracy of the most frequent token, and `ceiling`,
        that of the most frequent token after the same last near + far tokens, as far as their sums and the last of
        them tell. Accuracies in [0, 1].
    """
    wanted, possible = TOKENS // length + 3, task.modulus**task.seed_length
    everything = possible <= wanted
    if possible < 2**63:
        rows = make_table(task, "disjoint", min(wanted, possible), length)
    else:  # no two of so many will be the same
        seeds = np.random.default_rng(0).integers(task.modulus, size=(wanted, task.seed_length), dtype=np.int32)
        rows = task.extend(seeds, length)
    kinds, result = task.kinds(length), {}
    for kind in (kind for kind in KINDS if kind in kinds):
        positions = task.seed_length + np.flatnonzero(kinds == kind)
        nothing = np.zeros((len(rows), len(positions)), dtype=np.int64)
        # The first token has no predecessor that follows from a sum: its sum is all that could tell it.
        views = [] if kind == "first" else _views(task, rows, positions)
        result[kind] = {
            "chance": _accuracy(nothing, rows[:, positions], everything),
            "ceiling": max(_accuracy(seen, rows[:, positions], everything) for seen in (nothing, *views)),
        }
    return result


def _views(task: Task, rows: Int32Array, positions: NDArray[np.intp]) -> list[NDArray[np.int64]]:
    """What a predictor of the tokens at some positions sees, as one number each, shape (rows, positions)."""
    sums = np.concatenate([np.zeros((len(rows), 1), dtype=np.int64), rows.cumsum(axis=1, dtype=np.int64)], axis=1)

    def total(end: NDArray[np.intp], count: int) -> NDArray[np.int64]:
        return sums[:, end] - sums[:, end - count]

    largest = task.seed_length * task.modulus + 1
    near, before = total(positions, task.near), total(positions - 1, task.near)
    shortcut = (before * largest + near) * (task.modulus + 1) + rows[:, positions - 1]
    return [shortcut, total(positions, task.seed_length)]


def _accuracy(seen: NDArray[np.int64], answers: Int32Array, everything: bool) -> float:
    """The share of the last third's answers that are the most frequent ones after the same view in the others.

    Of `everything` there is, the share of all answers that are the most frequent ones after the same view.
    """
    fit, test = (len(seen), 0) if everything else (2 * len(seen) // 3,) * 2
    classes = int(answers.max()) + 1
    pairs, counts = np.unique(seen[:fit] * classes + answers[:fit], return_counts=True)
    order = np.lexsort((counts, pairs // classes))  # within a view, the most frequent answer last
    views, answer = pairs[order] // classes, pairs[order] % classes
    last = np.flatnonzero(np.append(views[1:] != views[:-1], True))
    views, answer = views[last], answer[last]
    at = np.searchsorted(views, seen[test:]).clip(max=len(views) - 1)
    guess = np.where(views[at] == seen[test:], answer[at], np.bincount(answers[:fit].ravel()).argmax())
    return float((guess == answers[test:]).mean())
