"""Claims of notebook 5."""

from __future__ import annotations

from typing import Any

import numpy as np


def perplexity_is_the_formula(by_hand: float, by_library: float) -> None:
    assert abs(by_hand / by_library - 1) < 1e-5


def two_documents_are_long_enough(documents: Any) -> None:
    assert len(documents) == 2


def yarn_carries_past_the_trained_length_rounded_or_not(curves: dict[str, list[float]]) -> None:
    plain, yarn, rounded = curves.values()
    assert plain[-1] > 1.3 * yarn[-1]
    assert abs(rounded[-1] / yarn[-1] - 1) < 0.05


def keys_are_found_with_yarn_only(answered: dict[str, Any]) -> None:
    assert answered["default"][0] >= 2 and answered["default"][1] == 0
    assert min(answered["yarn"].min(), answered["resonance_yarn"].min()) == 3


def fine_tuned_or_not_rounding_changes_little(last: Any) -> None:
    for ropes in last.values():
        far = {rope: np.mean(seeds, 0)[-1] for rope, seeds in ropes.items()}
        assert abs(far["resonance_yarn"] / far["yarn"] - 1) < 0.05
        assert all(far[rope] > 2 * far["yarn"] for rope in ("default", "ntk"))
    assert list(last) == [0, 50]


def keys_of_the_experiment(share: Any) -> None:
    assert share["default"][0] > 80 and share["default"][1:].max() == 0
    assert min(share["yarn"].min(), share["resonance_yarn"].min()) > 50


def within_the_window_yarn_costs(report: Any) -> None:
    for method in ("plain", "self-extend", "dca", "dynamic"):
        mean, _, high = report[method]["512"]["to_resonance_yarn"]
        assert mean < high < 0


def past_it_position_maps_are_ahead_and_plain_rope_fails(report: Any, lengths: list[int]) -> None:
    for length in map(str, lengths[1:]):
        assert report["plain"][length]["to_resonance_yarn"][1] > 30
        for method in ("self-extend", "dca", "dynamic"):
            assert report[method][length]["to_resonance_yarn"][2] < 0


def rounding_makes_no_difference_that_shows(report: Any, lengths: list[int]) -> None:
    for method in ("self-extend", "dca", "dynamic"):
        for length in map(str, lengths):
            one, other = (report[name][length]["to_resonance_yarn"] for name in (method, f"resonance_{method}"))
            assert one[1] < other[2] and other[1] < one[2]
