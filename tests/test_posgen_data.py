"""PosGen's sequences and splits: against the authors' figures, and a plain loop over the paper's definition."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from itertools import combinations, cycle, islice, product
from pathlib import Path

from mlx_resonance.posgen.data import (
    IGNORED,
    SPLITS,
    labels,
    make_splits,
    make_table,
    official_seeds,
    random_seeds,
    tokens,
)
from mlx_resonance.posgen.settings import PRESETS
from mlx_resonance.posgen.tasks import ARITHMETICS, SUBTASKS, Task

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = json.loads((Path(__file__).parent / "data" / "posgen.json").read_text(encoding="utf-8"))
OUR_NAMES = {"recurrent": "recursive", "cot": "cot", "semirecurrent": "semi-recursive"}
LENGTHS = {"train": 64, "val": 256, "test": 256}
SIZES = (10000, 1000, 1000)


def golden_name(golden):
    return f"{OUR_NAMES[golden['subtask']]}-{golden['arithmetic']}-{golden['modulus']}"


def golden_task(golden):
    return Task(OUR_NAMES[golden["subtask"]], *(golden[key] for key in ("arithmetic", "modulus", "near", "far")))


def sha256(rows):
    assert rows.dtype == np.int32
    return hashlib.sha256(rows.astype("<i4").tobytes(order="C")).hexdigest()


def distinct(rows):
    return {row.tobytes() for row in rows}


def plain_result(arithmetic, total, modulus):
    if arithmetic == "mod_addition":
        return total % modulus
    if arithmetic == "pow_sin":
        return math.floor(math.sin(total) ** 2 * modulus)
    # In this order: of 12 digits and 7, a half turn and a twelfth, another one gives 6, not 5.
    return math.floor(abs(math.sin(2 * math.pi * (total % modulus) / modulus)) * modulus)


def plain_row(task, seed, length):
    """The paper's definition, token by token."""
    row = [int(token) for token in seed]
    window = produced = 0
    while len(row) < length:
        before_near = len(row) - task.near
        if task.subtask == "recursive":
            far = row[before_near - task.far : before_near]
        elif task.subtask == "cot":
            far = row[: task.far]
        else:
            far = row[window : window + task.far]
        row.append(plain_result(task.arithmetic, sum(row[before_near:]) + sum(far), task.modulus))
        produced += 1
        if produced % 2 == 0:
            window += 1
    return row


def plain_rows(task, seeds, length):
    return [plain_row(task, seed, length) for seed in seeds]


@pytest.fixture(scope="module", params=GOLDEN, ids=golden_name)
def golden(request):
    return request.param


@pytest.fixture(scope="module")
def table(golden):
    return make_table(golden_task(golden), "official", *golden["shape"])


@pytest.fixture(scope="module")
def splits(golden):
    made = make_splits(golden_task(golden), "official", SIZES)
    return {"train": made.train, "val": made.validation, "test": made.test}


# --- the authors' figures


def test_figures_are_there_for_every_subtask():
    cases = {(golden["arithmetic"], golden["modulus"]) for golden in GOLDEN}
    assert cases == {("mod_addition", 17), ("mod_addition", 7), ("pow_sin", 17)}
    assert {golden_name(golden) for golden in GOLDEN} == {f"{s}-{a}-{m}" for s in SUBTASKS for a, m in cases}


def test_table_equals_that_of_the_authors(golden, table):
    assert table.shape == tuple(golden["shape"]) == (12000, 512)
    assert table[:3, :40].tolist() == golden["rows_head"]
    assert table[5000, :40].tolist() == golden["row_5000"]
    assert table[-1, :40].tolist() == golden["row_last"]
    assert len(distinct(table)) == golden["unique_rows"]
    assert sha256(table) == golden["sha256_int32"]


@pytest.mark.parametrize("name", LENGTHS)
def test_split_equals_that_of_the_authors(golden, splits, name):
    rows, expected = splits[name], golden["splits"][name]
    assert rows.shape == (expected["rows"], LENGTHS[name])
    assert rows[0, :24].tolist() == expected["first_row"]
    assert rows[-1, :24].tolist() == expected["last_row"]
    assert sha256(rows) == expected["sha256_int32"]


@pytest.mark.parametrize("name", LENGTHS)
def test_first_example_equals_that_of_the_authors(golden, splits, name):
    expected, task = golden["splits"][name], golden_task(golden)
    ids, targets = tokens(splits[name][:1], task.modulus), labels(splits[name][:1], task)
    assert ids.shape == targets.shape == (1, expected["n_labels"])
    # Theirs reads all of a training row, of the others what comes before the first label.
    assert expected["n_input"] == (ids.shape[1] if name == "train" else 1 + task.seed_length)
    assert ids[0, : expected["n_input"]][:12].tolist() == expected["input_ids_first"]
    assert targets[0, :12].tolist() == expected["labels_first"]


def test_preset_makes_the_data_of_the_authors(golden, splits):
    preset = PRESETS["official"]
    made = make_splits(golden_task(golden), preset.split, preset.sizes, preset.train_length, preset.test_length)
    for name, rows in zip(LENGTHS, (made.train, made.validation, made.test), strict=True):
        np.testing.assert_array_equal(rows, splits[name])


def test_plain_loop_equals_the_authors(golden):
    expected = [*golden["rows_head"], golden["row_5000"], golden["row_last"]]
    task = golden_task(golden)
    assert plain_rows(task, [row[: task.seed_length] for row in expected], 40) == expected


# --- the paper's definition


@st.composite
def sequences(draw):
    task = Task(
        draw(st.sampled_from(SUBTASKS)),
        draw(st.sampled_from(ARITHMETICS)),
        modulus=draw(st.integers(2, 23)),
        near=draw(st.integers(1, 5)),
        far=draw(st.integers(0, 4)),
    )
    seed = st.tuples(*[st.integers(0, task.modulus - 1)] * task.seed_length)
    seeds = draw(st.lists(seed, min_size=1, max_size=4))
    return task, seeds, draw(st.integers(task.seed_length, task.seed_length + 70))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(sequences())
def test_rows_are_the_paper_s(case):
    task, seeds, length = case
    given_seeds = np.array(seeds, dtype=np.int32)
    rows = task.extend(given_seeds, length)
    assert rows.shape == (len(seeds), length)
    assert rows.dtype == np.int32
    assert rows.tolist() == plain_rows(task, seeds, length)
    assert given_seeds.tolist() == [list(seed) for seed in seeds]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_rows_follow_the_paper_far_beyond_the_training_length(subtask, arithmetic):
    task = Task(subtask, arithmetic, modulus=17, near=3, far=2)
    seeds = random_seeds(task, 20)
    assert task.extend(seeds, 512).tolist() == plain_rows(task, seeds, 512)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("modulus", [4, 7, 8, 12, 16, 17, 18, 20])
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_quarter_turn_gives_the_modulus_itself(subtask, modulus, split):
    task = Task(subtask, "pow_sin_2pi", modulus, near=2, far=1)
    table = make_table(task, split, 40, 96)
    assert table.tolist() == plain_rows(task, table[:, :3], 96)
    assert table.min() == 0
    assert (table.max() == modulus) == (modulus % 4 == 0)


def test_two_tokens_read_one_far_window():
    seed = np.array([[5, 1]], dtype=np.int32)
    near_and_far = {
        "recursive": [1 + 5, 6 + 1, 7 + 6, 13 + 7, 20 + 13, 33 + 20],
        "cot": [1 + 5, 6 + 5, 11 + 5, 16 + 5, 21 + 5, 26 + 5],
        "semi-recursive": [1 + 5, 6 + 5, 11 + 1, 12 + 1, 13 + 6, 19 + 6],
    }
    for subtask, expected in near_and_far.items():
        assert Task(subtask, modulus=1000, near=1, far=1).extend(seed, 8)[0, 2:].tolist() == expected


@pytest.mark.parametrize("length", [4, 5, 6])
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_shortest_rows(subtask, length):
    task = Task(subtask)
    seeds = random_seeds(task, 5)
    assert task.extend(seeds, length).tolist() == plain_rows(task, seeds, length)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_without_far_tokens_all_subtasks_are_one(arithmetic):
    recursive, cot, semi = (make_table(Task(s, arithmetic, 7, 3, 0), "disjoint", 100, 64) for s in SUBTASKS)
    np.testing.assert_array_equal(recursive, cot)
    np.testing.assert_array_equal(recursive, semi)


# --- the official split


def cycled(task, rows):
    return [list(seed) for seed in islice(cycle(combinations(range(task.modulus), task.seed_length)), rows)]


@pytest.mark.parametrize("modulus, near, far", [(17, 3, 1), (7, 2, 1), (5, 4, 1), (3, 1, 0), (23, 2, 0)])
@pytest.mark.parametrize("rows", [1, 2, 34, 35, 36, 70, 71, 2379, 2380, 2381, 12000])
def test_official_seeds_are_the_combinations_over_and_over(modulus, near, far, rows):
    task = Task("cot", modulus=modulus, near=near, far=far)
    seeds = official_seeds(task, rows)
    assert seeds.dtype == np.int32
    assert seeds.tolist() == cycled(task, rows)


@pytest.mark.parametrize("rows", [1, 10, 34, 35, 36, 200])
@pytest.mark.parametrize("subtask", SUBTASKS)
def test_official_table_of_any_size(subtask, rows):
    """Fewer rows than there are seeds, as many, and more."""
    task = Task(subtask, modulus=7, near=2, far=1)
    table = make_table(task, "official", rows, 40)
    assert table.dtype == np.int32
    assert table.tolist() == plain_rows(task, cycled(task, rows), 40)


@pytest.mark.parametrize("rows", [1, 1000, 2379])
def test_fewer_rows_are_the_first_of_more(golden, table, rows):
    np.testing.assert_array_equal(make_table(golden_task(golden), "official", rows, 512), table[:rows])


@pytest.mark.parametrize("length", [5, 64, 511])
def test_shorter_rows_are_the_beginning_of_longer_ones(golden, table, length):
    np.testing.assert_array_equal(make_table(golden_task(golden), "official", 12000, length), table[:, :length])


def test_training_has_the_beginning_of_every_official_test_row(splits):
    train = distinct(splits["train"])
    assert distinct(splits["test"][:, :64]) <= train
    assert distinct(splits["val"][:, :64]) <= train
    np.testing.assert_array_equal(splits["val"][:, :64], splits["train"][:1000])
    np.testing.assert_array_equal(splits["test"][:, :64], splits["train"][1000:2000])


def test_official_seed_of_all_digits():
    table = make_table(Task("cot", modulus=4, near=3, far=1), "official", 5, 8)
    assert table[:, :4].tolist() == [[0, 1, 2, 3]] * 5


# --- the disjoint split

HASHED = """
import hashlib
from mlx_resonance.posgen.data import make_splits
from mlx_resonance.posgen.tasks import Task
made = make_splits(Task("semi-recursive"), "disjoint", (10000, 1000, 1000))
for rows in (made.train, made.validation, made.test):
    print(hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest())
"""


def assert_unsorted(seeds, modulus):
    """Neither by the first digit nor by the last: as many steps up as down, to five standard deviations."""
    weights = modulus ** np.arange(seeds.shape[1])
    for number in (seeds @ weights, seeds @ weights[::-1]):
        assert abs((np.diff(number) > 0).mean() - 0.5) < 5 * (12 * len(seeds)) ** -0.5


@pytest.fixture(scope="module", params=SUBTASKS)
def disjoint(request):
    task = Task(request.param)
    return task, make_splits(task, "disjoint", SIZES)


def test_disjoint_rows_have_their_lengths(disjoint):
    rows = disjoint[1]
    assert [rows.train.shape, rows.validation.shape, rows.test.shape] == [(10000, 64), (1000, 256), (1000, 256)]
    assert {rows.train.dtype, rows.validation.dtype, rows.test.dtype} == {np.dtype(np.int32)}


def test_no_two_disjoint_rows_share_a_seed(disjoint):
    rows = disjoint[1]
    seeds = [tuple(row[:4].tolist()) for part in (rows.train, rows.validation, rows.test) for row in part]
    assert len(set(seeds)) == len(seeds) == 12000


def test_disjoint_rows_are_the_paper_s(disjoint):
    task, rows = disjoint
    for part in (rows.train, rows.validation, rows.test):
        some = part[::97]
        assert some.tolist() == plain_rows(task, some[:, :4], part.shape[1])


def test_disjoint_rows_are_the_table_cut_in_three(disjoint):
    task, rows = disjoint
    table = make_table(task, "disjoint", 12000, 256)
    np.testing.assert_array_equal(rows.train, table[:10000, :64])
    np.testing.assert_array_equal(rows.validation, table[10000:11000])
    np.testing.assert_array_equal(rows.test, table[11000:])


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_disjoint_seeds_are_spread_over_all(disjoint, part):
    seeds = getattr(disjoint[1], part)[:, :4].astype(np.int64)
    # Five standard deviations of a uniform draw.
    expected = len(seeds) / 17
    for digit in seeds.T:
        assert np.abs(np.bincount(digit, minlength=17) - expected).max() < 5 * expected**0.5
    pairs = np.bincount(seeds[:, 0] * 17 + seeds[:, 1], minlength=289)
    assert ((pairs - len(seeds) / 289) ** 2).sum() / (len(seeds) / 289) < 288 + 5 * (2 * 288) ** 0.5
    # Of 17⁴ tuples, C(17, 4) increase: 2.8 %.
    assert np.all(np.diff(seeds, axis=1) > 0, axis=1).mean() < 0.06
    assert_unsorted(seeds, 17)


@pytest.mark.parametrize("modulus, near, far", [(5, 2, 1), (11, 3, 1), (2, 1, 0)])
def test_as_many_disjoint_rows_as_seeds(modulus, near, far):
    possible = list(product(range(modulus), repeat=near + far))
    seeds = random_seeds(Task("cot", modulus=modulus, near=near, far=far), len(possible))
    assert sorted(tuple(seed) for seed in seeds.tolist()) == possible
    if len(possible) > 100:
        assert_unsorted(seeds, modulus)


@pytest.mark.parametrize("modulus, near, far", [(23, 5, 4), (2, 50, 12)])
def test_few_of_very_many_seeds(modulus, near, far):
    seeds = random_seeds(Task("cot", modulus=modulus, near=near, far=far), 2000)
    assert seeds.shape == (2000, near + far)
    assert len(distinct(seeds)) == 2000
    assert (seeds.min(axis=0) == 0).all()
    assert (seeds.max(axis=0) == modulus - 1).all()


def test_disjoint_seeds_are_the_same_at_every_call():
    task = Task("cot")
    first = random_seeds(task, 12000)
    np.random.seed(1)
    np.testing.assert_array_equal(random_seeds(task, 12000), first)


def test_disjoint_seeds_are_the_same_for_every_rule():
    seeds = random_seeds(Task("cot"), 500)
    for subtask, arithmetic in product(SUBTASKS, ARITHMETICS):
        np.testing.assert_array_equal(make_table(Task(subtask, arithmetic), "disjoint", 500, 8)[:, :4], seeds)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_disjoint_rows_do_not_depend_on_the_hash_seed(hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", HASHED], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    made = make_splits(Task("semi-recursive"), "disjoint", SIZES)
    assert (done.stdout.split(), done.stderr) == ([sha256(made.train), sha256(made.validation), sha256(made.test)], "")


@pytest.mark.parametrize("name", ["paper", "laptop", "smoke"])
def test_presets_with_disjoint_seeds(name):
    preset = PRESETS[name]
    made = make_splits(Task("recursive"), preset.split, preset.sizes, preset.train_length, preset.test_length)
    parts = (made.train, made.validation, made.test)
    assert tuple(len(part) for part in parts) == preset.sizes
    assert [part.shape[1] for part in parts] == [preset.train_length, preset.test_length, preset.test_length]
    assert len(distinct(np.concatenate([part[:, :4] for part in parts]))) == sum(preset.sizes)


# --- what a model reads


@pytest.mark.parametrize("modulus, near, far", [(17, 3, 1), (7, 2, 1), (2, 1, 0), (23, 5, 4)])
def test_tokens_and_labels(modulus, near, far):
    rows = np.arange(60, dtype=np.int32).reshape(3, 20) % modulus
    written = rows.tolist()
    ids, targets = tokens(rows, modulus), labels(rows, Task("cot", modulus=modulus, near=near, far=far))
    assert ids.dtype == targets.dtype == np.int32
    assert ids.tolist() == [[modulus + 4, *row] for row in written]
    assert targets.tolist() == [[-100] * (1 + near + far) + row[near + far :] for row in written]
    assert rows.tolist() == written
    assert IGNORED == -100


def test_the_modulus_itself_is_the_unknown_token():
    """As the official tokenizer reads it: [UNK], the id after the digits, before [PAD], [CLS], [SEP] and [EOS]."""
    task = Task("cot", "pow_sin_2pi", modulus=4, near=1, far=1)
    rows = task.extend(np.array([[0, 1]], dtype=np.int32), 4)
    assert tokens(rows, 4).tolist() == [[8, 0, 1, 4, 0]]
    assert labels(rows, task).tolist() == [[-100, -100, -100, 4, 0]]


# --- what is refused

COT = Task("cot")


def splits_of(task=COT, split="official", sizes=(40, 4, 4), **lengths):
    return lambda: make_splits(task, split, sizes, **lengths)


def table_of(task=COT, split="official", rows=10, length=64):
    return lambda: make_table(task, split, rows, length)


# What the message names, what it says would be right, and what does it.
REFUSED = [
    *(("modulus", "at least 2", lambda modulus=modulus: Task("cot", modulus=modulus)) for modulus in (1, 0, -17)),
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
    ("near + far", "too many", table_of(Task("cot", modulus=23, near=10, far=5), "disjoint")),
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
def test_refused_with_the_name_and_what_is_right(name, right, call):
    with pytest.raises(ValueError, match=rf"^\[posgen\] .*(?<!\w){re.escape(name)}(?!\w)") as refusal:
        call()
    assert right in str(refusal.value)


def test_least_that_is_not_refused():
    made = make_splits(Task("cot", modulus=2, near=1, far=0), "official", (2, 1, 1), train_length=2, test_length=2)
    assert [part.tolist() for part in (made.train, made.validation, made.test)] == [
        [[0, 0], [1, 1]],
        [[0, 0]],
        [[1, 1]],
    ]


@pytest.mark.parametrize(("subtask", "every"), [("recursive", 1), ("cot", 1), ("semi-recursive", 2)])
def test_a_rule_of_two_terms_serves_all_but_the_first_token(subtask: str, every: int) -> None:
    """Two sums that follow one another share all terms but two, so x[n] = 2·x[n - 1] - x[n - 1 - window] mod modulus.

    The window is near + far tokens in a recursive sequence and near tokens where the far ones stay the same: always
    in a chain of thought, at every second token of a semi-recursive sequence. A model that learns this instead of the
    sum is right in 59 of 60, or half, of the training positions.
    """
    task = Task(subtask)
    rows = make_table(task, "disjoint", 300, 256)
    window = task.seed_length if subtask == "recursive" else task.near
    guess = (2 * rows[:, task.seed_length : -1] - rows[:, task.seed_length - window : -1 - window]) % task.modulus
    right = (guess == rows[:, task.seed_length + 1 :]).mean(axis=0)
    assert (right[::every] == 1).all()
    if every == 2:
        assert right[1::2].mean() < 0.1


def test_the_disjoint_rows_are_those_of_the_committed_results() -> None:
    """NumPy does not promise its random streams for ever: should this fail, the results are of other rows."""
    table = make_table(Task("cot"), "disjoint", 10600, 256)
    assert sha256(table) == "4c420998f1d2deaa81860ebad4084d65f16226053cd5be3139aafbb64dd42ab2"
