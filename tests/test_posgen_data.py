"""PosGen's tables and official split against the authors' figures, byte by byte."""

import json
from itertools import combinations, cycle, islice
from pathlib import Path

from mlx_resonance.posgen.data import make_splits, make_table, official_seeds, tokens
from mlx_resonance.posgen.settings import PRESETS
from mlx_resonance.posgen.tasks import SUBTASKS, Task

import numpy as np
import pytest

from .posgen_plain import distinct, plain_rows, sha256

GOLDEN = json.loads((Path(__file__).parent / "data" / "posgen.json").read_text(encoding="utf-8"))
OUR_NAMES = {"recurrent": "recursive", "cot": "cot", "semirecurrent": "semi-recursive"}
LENGTHS = {"train": 64, "val": 256, "test": 256}
SIZES = (10000, 1000, 1000)


def golden_name(golden):
    return f"{OUR_NAMES[golden['subtask']]}-{golden['arithmetic']}-{golden['modulus']}"


def golden_task(golden):
    return Task(OUR_NAMES[golden["subtask"]], *(golden[key] for key in ("arithmetic", "modulus", "near", "far")))


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
    ids, start = tokens(splits[name][:1], task.modulus), 1 + task.seed_length
    assert ids.shape == (1, expected["n_labels"])
    # Their model reads a whole training row; for other rows, only what precedes the first label.
    assert expected["n_input"] == (ids.shape[1] if name == "train" else start)
    assert ids[0, : expected["n_input"]][:12].tolist() == expected["input_ids_first"]
    assert [-100] * start + ids[0, start:12].tolist() == expected["labels_first"]


def test_preset_makes_the_data_of_the_authors(golden, splits):
    preset = PRESETS["official"]
    made = make_splits(golden_task(golden), preset.split, preset.sizes, preset.train_length, preset.test_length)
    for name, rows in zip(LENGTHS, (made.train, made.validation, made.test), strict=True):
        np.testing.assert_array_equal(rows, splits[name])


def test_plain_loop_equals_the_authors(golden):
    expected = [*golden["rows_head"], golden["row_5000"], golden["row_last"]]
    task = golden_task(golden)
    assert plain_rows(task, [row[: task.seed_length] for row in expected], 40) == expected


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
    """Fewer rows than seeds, as many, and more."""
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


def test_smaller_parts_of_the_official_split_are_spread_over_its_own(golden):
    task = golden_task(golden)
    whole, part = (make_splits(task, "official", sizes) for sizes in (SIZES, (SIZES[0], 100, 250)))
    np.testing.assert_array_equal(part.train, whole.train)
    np.testing.assert_array_equal(part.validation, whole.validation[::10])
    np.testing.assert_array_equal(part.test, whole.test[::4])
    assert SIZES == (10000, 1000, 1000)


def test_official_seed_of_all_digits():
    table = make_table(Task("cot", modulus=4, near=3, far=1), "official", 5, 8)
    assert table[:, :4].tolist() == [[0, 1, 2, 3]] * 5
