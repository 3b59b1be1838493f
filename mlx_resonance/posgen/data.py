"""PosGen's data: a table of sequences, split into training, validation and test rows, and the tokens of a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations
from math import comb

import numpy as np

from ..errors import UsageError, check_option
from .tasks import Int32Array, Task

SPLITS = ("official", "disjoint")
SPECIAL = 5  # token ids after the digits: [UNK], [PAD], [CLS], [SEP], [EOS]
LARGEST = 2**28  # tokens of a table: 1 GB, and up to three times that while it is made


@dataclass(frozen=True)
class Splits:
    """Rows for training, for the choice of the best weights, and for the results.

    Attributes:
        train: int32, shape (rows, train_length), digits without [EOS].
        validation, test: int32, shape (rows, test_length).
    """

    train: Int32Array
    validation: Int32Array
    test: Int32Array


def official_seeds(task: Task, rows: int) -> Int32Array:
    """The official code's seeds, shape (rows, near + far): increasing tuples of distinct digits, repeated in order.

    Raises:
        UsageError: there are fewer than near + far digits.

    Source: sheryc/resonance_rope `src/data/components/base_sequence_dataset.py`.
    """
    if task.seed_length > task.modulus:
        raise UsageError(
            f"near + far of the official split must be at most the modulus {task.modulus}, "
            f"got {task.near} + {task.far}",
            remedies=[{"split": "disjoint"}],
        )
    distinct = min(rows, comb(task.modulus, task.seed_length))
    digits = chain.from_iterable(combinations(range(task.modulus), task.seed_length))
    seeds = np.fromiter(digits, dtype=np.int32, count=distinct * task.seed_length)
    return np.resize(seeds, (rows, task.seed_length))


def random_seeds(task: Task, rows: int) -> Int32Array:
    """Distinct random seeds, shape (rows, near + far), the same ones at every call.

    Raises:
        UsageError: there are fewer seeds than rows.

    Source: arXiv 2403.00071, section 5.
    """
    possible = task.modulus**task.seed_length
    if rows > possible:
        raise UsageError(
            f"{rows} rows of the disjoint split need as many different seeds; {task.seed_length} digits of modulus "
            f"{task.modulus} give {possible}"
        )
    if possible >= 2**63:
        raise UsageError(
            "modulus to the power of near + far must be less than 2**63 for the disjoint split, "
            f"got {task.modulus}**{task.seed_length}"
        )
    drawn = np.random.default_rng(0).choice(possible, size=rows, replace=False)
    digits = [drawn // task.modulus**i % task.modulus for i in range(task.seed_length)]
    return np.stack(digits, axis=1).astype(np.int32)


def make_table(task: Task, split: str, rows: int, length: int) -> Int32Array:
    """All sequences of a split.

    Args:
        task: the rule.
        split: `official` (as in the code) or `disjoint` (as in the paper's text).
        rows: number of sequences.
        length: tokens of a sequence, at least near + far.

    Returns:
        int32, shape (rows, length).

    Raises:
        UsageError: an unknown split, too few seeds, a length shorter than the seed, or a table of more than 2²⁸ tokens.
    """
    check_option("split", split in SPLITS, f"one of {', '.join(SPLITS)}", repr(split))
    check_option("rows", rows >= 1, "at least 1", rows)
    if rows * length > LARGEST:
        raise UsageError(f"rows times length must be at most 2**28, got {rows} times {length}", option="rows")
    if split == "disjoint":
        return task.extend(random_seeds(task, rows), length)
    # The rows repeat: extend each distinct seed once.
    distinct = min(rows, comb(task.modulus, task.seed_length))
    return np.resize(task.extend(official_seeds(task, distinct), length), (rows, length))


def make_splits(
    task: Task, split: str, sizes: tuple[int, int, int], train_length: int = 64, test_length: int = 256
) -> Splits:
    """Split a table into training, validation and test rows.

    In the `official` split, validation has the first tenth of the training rows and test the second tenth, or as many
    of these as asked for, evenly spread: a model has seen the beginning of every test sequence. Larger parts are the
    first rows and those after them. In the `disjoint` split, no two rows share a seed.

    Args:
        task: the rule.
        split: `official` or `disjoint`.
        sizes: rows of training, validation, test.
        train_length, test_length: tokens of a training row, and of a validation or test row.

    Raises:
        UsageError: not near + far < train_length <= test_length, an empty part, or as in `make_table`.
    """
    if not task.seed_length < train_length <= test_length:
        raise UsageError(
            f"near + far = {task.seed_length} < train_length <= test_length must hold, got {train_length} and "
            f"{test_length}"
        )
    check_option("sizes", min(sizes) >= 1, "at least 1 each", sizes)
    train, validation, test = sizes
    table = make_table(task, split, sum(sizes), test_length)
    tenth = train // 10
    if split == "official" and max(validation, test) <= tenth:
        first, second = (np.arange(rows) * tenth // rows for rows in (validation, test))
        return Splits(table[:train, :train_length], table[first], table[tenth + second])
    start = 0 if split == "official" else train
    middle = start + validation
    return Splits(table[:train, :train_length], table[start:middle], table[middle : middle + test])


def tokens(rows: Int32Array, modulus: int) -> Int32Array:
    """The token ids of rows: [EOS], then the digits.

    The ids are those of the official tokenizer: digits 0 … modulus - 1, then [UNK], [PAD], [CLS], [SEP], [EOS]. Of rows
    of shape (N, L) they have the shape (N, 1 + L).
    """
    return np.concatenate([np.full((len(rows), 1), modulus + SPECIAL - 1, dtype=np.int32), rows], axis=1)
