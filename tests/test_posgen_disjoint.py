"""PosGen's disjoint split: no two rows share a seed, and the seeds are spread over all possible ones."""

import os
import subprocess
import sys
from itertools import product

from mlx_resonance.posgen.data import make_splits, make_table, random_seeds
from mlx_resonance.posgen.settings import PRESETS
from mlx_resonance.posgen.tasks import ARITHMETICS, SUBTASKS, Task

import numpy as np
import pytest

from .posgen_plain import distinct, plain_rows, sha256

SIZES = (10000, 1000, 1000)
HASHED = """
import hashlib
from mlx_resonance.posgen.data import make_splits
from mlx_resonance.posgen.tasks import Task
made = make_splits(Task("semi-recursive"), "disjoint", (10000, 1000, 1000))
for rows in (made.train, made.validation, made.test):
    print(hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest())
"""


def assert_unsorted(seeds, modulus):
    """Neither by the first digit nor by the last: as many steps up as down, within five standard deviations."""
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


def test_disjoint_rows_are_the_papers(disjoint):
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


def test_disjoint_rows_do_not_depend_on_the_hash_seed():
    environment = os.environ | {"PYTHONHASHSEED": "1"}
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


def test_the_disjoint_rows_are_those_of_the_committed_results() -> None:
    """NumPy does not promise stable random streams: if this fails, the committed results belong to other rows."""
    table = make_table(Task("cot"), "disjoint", 10600, 256)
    assert sha256(table) == "4c420998f1d2deaa81860ebad4084d65f16226053cd5be3139aafbb64dd42ab2"
