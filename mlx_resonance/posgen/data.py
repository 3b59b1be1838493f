"""PosGen's data: a table of sequences, cut into training, validation and test rows, and the tokens a model reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations
from math import comb

import numpy as np

from .tasks import Int32Array, Task

SPLITS = ("official", "disjoint")
LARGEST = 2**31  # tokens of a table: 8 GB


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose a checkpoint by, and to report.

    Attributes:
        train: int32, shape (rows, train_length), digits without [EOS].
        validation, test: int32, shape (rows, test_length).
    """

    train: Int32Array
    validation: Int32Array
    test: Int32Array


def official_seeds(task: Task, rows: int) -> Int32Array:
    """The seeds of the official code: increasing tuples of different digits, over and over.

    Returns:
        int32, shape (rows, near + far).

    Raises:
        ValueError: there are no near + far different digits.

    Source: sheryc/resonance_rope `src/data/components/base_sequence_dataset.py`.
    """
    if task.seed_length > task.modulus:
        raise ValueError(
            f"[posgen] near + far must be at most the modulus {task.modulus}, got {task.near} + {task.far}: "
            "a seed of the official split is that many different digits"
        )
    distinct = min(rows, comb(task.modulus, task.seed_length))
    digits = chain.from_iterable(combinations(range(task.modulus), task.seed_length))
    seeds = np.fromiter(digits, dtype=np.int32, count=distinct * task.seed_length)
    return np.resize(seeds, (rows, task.seed_length))


def random_seeds(task: Task, rows: int) -> Int32Array:
    """Seeds drawn at random without a repeat, the same ones at every call.

    Returns:
        int32, shape (rows, near + far).

    Raises:
        ValueError: there are fewer seeds than rows.

    Source: arXiv 2403.00071, section 5.
    """
    possible = task.modulus**task.seed_length
    if rows > possible:
        raise ValueError(
            f"[posgen] {rows} rows of the disjoint split need as many different seeds; {task.seed_length} digits "
            f"of modulus {task.modulus} give {possible}"
        )
    if possible >= 2**63:
        raise ValueError(
            f"[posgen] near + far = {task.seed_length} digits of modulus {task.modulus} are too many: "
            "modulus^(near + far) must be below 2^63"
        )
    drawn = np.random.default_rng(0).choice(possible, size=rows, replace=False)
    digits = [drawn // task.modulus**i % task.modulus for i in range(task.seed_length)]
    return np.stack(digits, axis=1).astype(np.int32)


def make_table(task: Task, split: str, rows: int, length: int) -> Int32Array:
    """All sequences of a split, before it is cut.

    Args:
        task: the rule.
        split: `official` (as the code) or `disjoint` (as the paper says).
        rows: number of sequences.
        length: tokens of a sequence, at least near + far.

    Returns:
        int32, shape (rows, length).

    Raises:
        ValueError: an unknown split, too few seeds, or a length shorter than the seed.
    """
    if split not in SPLITS:
        raise ValueError(f"[posgen] split must be one of {', '.join(SPLITS)}, got {split!r}")
    if rows < 1:
        raise ValueError(f"[posgen] rows must be at least 1, got {rows}")
    if rows * length > LARGEST:
        raise ValueError(f"[posgen] rows times length must be at most 2**31, got {rows} times {length}")
    if split == "disjoint":
        return task.extend(random_seeds(task, rows), length)
    # The rows repeat: each distinct one is made once.
    distinct = min(rows, comb(task.modulus, task.seed_length))
    return np.resize(task.extend(official_seeds(task, distinct), length), (rows, length))


def make_splits(
    task: Task, split: str, sizes: tuple[int, int, int], train_length: int = 64, test_length: int = 256
) -> Splits:
    """Cut a table into training, validation and test rows.

    In the `official` split validation is the first rows of the training set and test the rows after them, so that, of
    its sizes, a model has seen the beginning of every test sequence; in the `disjoint` one no two rows share a seed.

    Args:
        task: the rule.
        split: `official` or `disjoint`.
        sizes: rows of training, validation, test.
        train_length, test_length: tokens of a training row, and of a validation or test row.

    Returns:
        The rows.

    Raises:
        ValueError: lengths not near + far < train_length <= test_length, or as `make_table`.
    """
    if not task.seed_length < train_length <= test_length:
        raise ValueError(
            f"[posgen] need near + far = {task.seed_length} < train_length <= test_length, "
            f"got {train_length} and {test_length}"
        )
    if min(sizes) < 1:
        raise ValueError(f"[posgen] sizes of train, validation and test must be at least 1, got {sizes}")
    train, validation, test = sizes
    table = make_table(task, split, sum(sizes), test_length)
    first = 0 if split == "official" else train
    middle = first + validation
    return Splits(table[:train, :train_length], table[first:middle], table[middle : middle + test])


def tokens(rows: Int32Array, modulus: int) -> Int32Array:
    """What the model reads: [EOS], then the digits.

    The ids are those of the official tokenizer: digits 0 … modulus - 1, then [UNK], [PAD], [CLS], [SEP], [EOS].

    Args:
        rows: shape (N, L).
        modulus: number of digits.

    Returns:
        int32, shape (N, 1 + L).
    """
    return np.concatenate([np.full((len(rows), 1), modulus + 4, dtype=np.int32), rows], axis=1)
