"""Which tokens of PosGen follow from the last ones, and how often a guess without far tokens is right."""

from collections import Counter, defaultdict
from itertools import product

from mlx_resonance.posgen.bounds import bounds
from mlx_resonance.posgen.data import make_table
from mlx_resonance.posgen.tasks import ARITHMETICS, SUBTASKS, Task

import numpy as np
import pytest


def test_kinds_of_tokens() -> None:
    """Of semi-recursive digits 4 to 11 the windows start at 0 0 1 1 2 2 3 3."""
    kinds = {subtask: Task(subtask).kinds(12).tolist() for subtask in SUBTASKS}
    assert kinds["recursive"] == kinds["cot"] == ["first"] + ["near"] * 7
    assert kinds["semi-recursive"] == ["first", "near", "far", "near", "far", "near", "far", "near"]
    assert Task("semi-recursive", far=0).kinds(12).tolist() == ["first"] + ["near"] * 8


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_bounds_of_addition(subtask: str) -> None:
    found = bounds(Task(subtask), 64)
    assert list(found) == ["first", "near", *["far"] * (subtask == "semi-recursive")]
    for kind, limits in found.items():
        error = 0.015 if kind == "first" else 0.006  # 4000 of them, and 250 000
        assert limits["chance"] == pytest.approx(1 / 17, abs=error)
        assert limits["ceiling"] == pytest.approx(1 if kind == "near" else 1 / 17, abs=error)


@pytest.mark.parametrize("count", [110, 125])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bounds_are_those_of_a_plain_count(arithmetic: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences with five digits, two near ones and a far one: what follows the same sums of the last tokens.

    Of some sequences a third is for the test; of all 125 there is, everything.
    """
    task, length = Task("semi-recursive", arithmetic, modulus=5, near=2, far=1), 40
    monkeypatch.setattr("mlx_resonance.posgen.bounds.TOKENS", (count - 3) * length)
    rows = make_table(task, "disjoint", count, length).tolist()
    fit, tested = (count, rows) if count == 5**3 else (2 * count // 3, rows[2 * count // 3 :])
    views = {
        "shortcut": lambda row, n: (sum(row[n - 3 : n - 1]), sum(row[n - 2 : n]), row[n - 1]),
        "total": lambda row, n: sum(row[n - 3 : n]),
    }
    found = bounds.__wrapped__(task, length)
    for kind, limits in found.items():
        positions = 3 + np.flatnonzero(task.kinds(length) == kind)
        seen: dict[tuple, Counter] = defaultdict(Counter)
        for row, n in product(rows[:fit], positions):
            for name, view in views.items():
                seen[name, view(row, n)][row[n]] += 1
            seen["any",][row[n]] += 1
        ((most, _),) = seen["any",].most_common(1)
        answers = list(product(tested, positions))
        chance = np.mean([row[n] == most for row, n in answers])
        assert limits["chance"] == pytest.approx(chance)

        def right(row: list[int], n: int, name: str, ties: bool, seen=seen, most=most) -> bool:
            counts = seen[name, views[name](row, n)].most_common(2)
            if not counts:
                return row[n] == most
            equal = [digit for digit, count in counts if count == counts[0][1]]
            return row[n] in equal if ties else equal == [row[n]]

        # Where two answers are as frequent, either may be the guess.
        low, high = (
            max(chance, *(np.mean([right(row, n, name, ties) for row, n in answers]) for name in views))
            for ties in (False, True)
        )
        assert (
            limits["ceiling"] == limits["chance"] if kind == "first" else low - 0.01 <= limits["ceiling"] <= high + 0.01
        )
    assert found["near"]["ceiling"] > found["far"]["ceiling"] + 0.05


def test_a_task_with_more_seeds_than_can_be_numbered() -> None:
    assert bounds(Task("cot", near=14, far=2), 64)["near"]["ceiling"] > 0.99


@pytest.mark.parametrize(("modulus", "near", "far"), [(2, 1, 0), (3, 1, 1), (2, 1, 1)])
def test_few_sequences_have_exact_bounds(modulus: int, near: int, far: int) -> None:
    """Every digit is the first one equally often, and a constant guess cannot do better."""
    found = bounds(Task("cot", modulus=modulus, near=near, far=far), 24)
    assert found["first"]["chance"] == pytest.approx(1 / modulus)
    assert all(limits["ceiling"] >= limits["chance"] >= 1 / modulus - 1e-9 for limits in found.values())
