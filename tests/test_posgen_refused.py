"""PosGen's data and settings: errors that name what is wrong and what would be right."""

import re
from dataclasses import replace

from mlx_resonance.errors import UsageError
from mlx_resonance.posgen.data import SPLITS, make_splits, make_table, official_seeds, random_seeds
from mlx_resonance.posgen.settings import MOST_STEPS, OFFICIAL_SEEDS, PRESETS, sweep_seeds
from mlx_resonance.posgen.tasks import Task

import numpy as np
import pytest

COT, LAPTOP = Task("cot"), PRESETS["laptop"]


def splits_of(task=COT, split="official", sizes=(40, 4, 4), **lengths):
    return lambda: make_splits(task, split, sizes, **lengths)


def table_of(task=COT, split="official", rows=10, length=64):
    return lambda: make_table(task, split, rows, length)


# What the message must name, what it must say would be right, and the call.
REFUSED = [
    *(("modulus", "at least 2", lambda modulus=modulus: Task("cot", modulus=modulus)) for modulus in (1, 0, -17)),
    *(
        ("near + far", "at most 2**20", lambda numbers=numbers: Task("cot", "mod_addition", *numbers))
        for numbers in ((2**18 + 1, 3, 1), (2, 2**19, 1), (10**30, 1, 0))
    ),
    *(
        ("epochs", right, lambda epochs=epochs: replace(LAPTOP, epochs=epochs))
        for epochs, right in ((0, "at least 1"), (MOST_STEPS // 400 + 1, f"at most {MOST_STEPS // 400}"))
    ),
    *(
        ("test length", "more than the training length 64", lambda length=length: replace(LAPTOP, test_length=length))
        for length in (64, 63)
    ),
    *(("seeds", "at least 1 and at most 1000", lambda count=count: sweep_seeds(count)) for count in (-1, 0, 1001)),
    *(("near", "at least 1", lambda near=near: Task("cot", near=near)) for near in (0, -1)),
    *(("far", "at least 0", lambda far=far: Task("cot", far=far)) for far in (-1, -3)),
    *(
        ("subtask", "recursive, cot, semi-recursive", lambda subtask=subtask: Task(subtask))
        for subtask in ("recurrent", "semirecurrent", "CoT", "", None)
    ),
    *(
        ("arithmetic", "mod_addition, pow_sin, pow_sin_2pi", lambda arithmetic=arithmetic: Task("cot", arithmetic))
        for arithmetic in ("addition", "str_hash", None)
    ),
    *(
        ("split", "official, disjoint", make(split=split))
        for make in (splits_of, table_of)
        for split in ("random", "train", "", None)
    ),
    *(
        ("near + far", "at most the modulus 5", make(task))
        for make in (splits_of, table_of)
        for task in (Task("cot", modulus=5, near=3, far=3), Task("recursive", modulus=5, near=6, far=0))
    ),
    ("near + far", "at most the modulus 5", lambda: official_seeds(Task("cot", modulus=5, near=3, far=3), 10)),
    ("17 rows", "give 16", table_of(Task("cot", modulus=4, near=1, far=1), "disjoint", 17)),
    ("17 rows", "give 16", lambda: random_seeds(Task("cot", modulus=4, near=1, far=1), 17)),
    (
        "17 rows",
        "give 16",
        splits_of(Task("cot", modulus=4, near=1, far=1), "disjoint", (11, 3, 3), train_length=8, test_length=8),
    ),
    ("near + far", "less than 2**63", table_of(Task("cot", modulus=23, near=10, far=5), "disjoint")),
    *(
        ("length", "at least near + far = 4", table_of(split=split, length=length))
        for split in SPLITS
        for length in (3, 0, -5)
    ),
    ("length", "at least near + far = 4", lambda: COT.extend(np.zeros((2, 4), dtype=np.int32), 3)),
    *(
        (
            name,
            "near + far = 4 < train_length <= test_length",
            splits_of(split=split, train_length=one, test_length=two),
        )
        for split in SPLITS
        for name, one, two in [
            ("train_length", 64, 63),
            ("test_length", 64, 32),
            ("train_length", 4, 256),
            ("train_length", 3, 256),
            ("train_length", 0, 256),
            ("train_length", 4, 4),
            ("test_length", -1, -1),
        ]
    ),
    *(("rows", "at least 1", table_of(split=split, rows=rows)) for split in SPLITS for rows in (0, -1)),
    *(
        ("sizes", "at least 1", splits_of(split=split, sizes=sizes))
        for split in SPLITS
        for sizes in [
            (0, 4, 4),
            (40, 0, 4),
            (40, 4, 0),
            (0, 0, 0),
            (-1, 40, 40),
            (40, -2, 4),
            (40, 4, -1),
        ]
    ),
]


@pytest.mark.parametrize("name, right, call", REFUSED, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(REFUSED)])
def test_the_error_names_what_is_wrong_and_what_is_right(name, right, call):
    with pytest.raises(UsageError, match=rf"(?<!\w){re.escape(name)}(?!\w)") as refusal:
        call()
    assert right in refusal.value.message and "--" not in str(refusal.value)


def test_the_smallest_accepted_task():
    made = make_splits(Task("cot", modulus=2, near=1, far=0), "official", (2, 1, 1), train_length=2, test_length=2)
    assert [part.tolist() for part in (made.train, made.validation, made.test)] == [
        [[0, 0], [1, 1]],
        [[0, 0]],
        [[1, 1]],
    ]


def test_the_largest_accepted_values():
    assert len(Task("cot", modulus=2**18).results()) == 2**20 + 1
    assert replace(LAPTOP, epochs=MOST_STEPS // 400).steps <= MOST_STEPS


def test_seeds_of_a_sweep_are_the_papers_then_others():
    assert sweep_seeds(5) == OFFICIAL_SEEDS and sweep_seeds(2) == OFFICIAL_SEEDS[:2]
    assert sweep_seeds(7) == (*OFFICIAL_SEEDS, 1, 2)
    assert len(set(sweep_seeds(1000))) == 1000  # 42 and 49 are among the paper's
