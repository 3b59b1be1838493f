"""PosGen's sequences against a plain loop over the paper's definition, and the token ids that a model reads."""

from mlx_resonance.posgen.data import SPLITS, make_table, random_seeds, tokens
from mlx_resonance.posgen.tasks import ARITHMETICS, SUBTASKS, Task

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .posgen_plain import plain_rows


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
def test_rows_are_the_papers(case):
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


@pytest.mark.parametrize(("subtask", "every"), [("recursive", 1), ("cot", 1), ("semi-recursive", 2)])
def test_a_rule_of_two_terms_serves_all_but_the_first_token(subtask: str, every: int) -> None:
    """Two consecutive sums share all terms but two, so x[n] = 2·x[n - 1] - x[n - 1 - window] mod modulus.

    The window is near + far tokens in a recursive sequence and near tokens where the far ones stay the same: always
    in a chain of thought, at every second token of a semi-recursive sequence. A model that learns this instead of the
    sum is right in 59 of 60, or half, of the training positions.
    """
    task = Task(subtask)
    rows = make_table(task, "disjoint", 300, 256)
    window = task.seed_length if subtask == "recursive" else task.near
    guess = (2 * rows[:, task.seed_length : -1] - rows[:, task.seed_length - window : -1 - window]) % task.modulus
    right = (guess == rows[:, task.seed_length + 1 :]).mean(axis=0)
    assert (right[::every] == 1).all() and (task.kinds(256)[1::every] == "near").all()
    if every == 2:
        assert right[1::2].mean() < 0.1


# --- what a model reads


@pytest.mark.parametrize("modulus", [17, 7, 2, 23])
def test_tokens(modulus):
    rows = np.arange(60, dtype=np.int32).reshape(3, 20) % modulus
    written = rows.tolist()
    ids = tokens(rows, modulus)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[modulus + 4, *row] for row in written]
    assert rows.tolist() == written


def test_the_modulus_itself_is_the_unknown_token():
    """As the official tokenizer reads it: [UNK], the id after the digits, before [PAD], [CLS], [SEP] and [EOS]."""
    task = Task("cot", "pow_sin_2pi", modulus=4, near=1, far=1)
    rows = task.extend(np.array([[0, 1]], dtype=np.int32), 4)
    assert tokens(rows, 4).tolist() == [[8, 0, 1, 4, 0]]
