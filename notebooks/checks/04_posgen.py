"""Claims of notebook 4."""

from __future__ import annotations

from typing import Any

from mlx_resonance.posgen.tasks import Task

import numpy as np


def the_next_digit_is_the_sum_of_four(rows: Any, far: Any, seed: Any) -> None:
    row = rows["recursive"]
    assert (row[20] + row[21] + row[22] + row[23]) % 17 == row[24]
    for name, back in far.items():
        long = Task(name).extend(seed, 256)[0]
        assert np.array_equal(long[:32], rows[name])
        assert all(long[n] == (long[n - 3 : n].sum() + long[back(n)]) % 17 for n in range(4, 256))


def no_test_sequence_was_seen(parts: Any, splits: Any) -> None:
    seeds = np.concatenate([part[:, :4] for part in parts.values()])
    assert len(np.unique(seeds, axis=0)) == len(seeds)
    assert splits.train.shape[1] == 64 and splits.test.shape[1] == 256


def the_shortcut_holds(holds: Any) -> None:
    assert holds["recursive"].all() and holds["cot"].all()
    assert holds["semi-recursive"][::2].all() and holds["semi-recursive"][1::2].mean() < 0.2


def the_smoke_preset_learns_nothing(steps: Any, smoke: Any, line: Any) -> None:
    assert len(steps) == smoke.steps == 6
    assert line["id"] < 0.2 and line["ood"] < 0.2 and steps[-1][1] > np.log(17)


def the_results_are_those_of_a_preset(settings: Any, header: Any, ours: Any) -> None:
    assert header["preset"] == "shortcut" and not header["settings"]["train_scaled"] and settings.steps == 1825
    assert all(len(seeds) >= 5 for encodings in ours.values() for seeds in encodings.values())


def the_shortcut_is_learned_and_falls_past_the_training_length(curves: Any, ENCODINGS: Any) -> None:
    for subtask, found in curves.items():
        right = (found["rope"] + found["resonance_rope"])[:60] / 2
        assert right[0] < 0.15 and right[1::2].mean() > 0.98
        assert (right[2::2].mean() > 0.98) == (subtask != "semi-recursive")
        assert all(found[name][1:60].mean() > found[name][-60:].mean() for name in ENCODINGS)


def yarn_is_ahead_as_in_the_paper(table: Any, PAPER: Any) -> None:
    for subtask in PAPER:
        assert table[subtask]["yarn/65"]["ood"] > table[subtask]["rope"]["ood"]
        assert PAPER[subtask]["yarn"] > PAPER[subtask]["rope"]


def one_interval_excludes_zero(pairs: Any, intervals: Any) -> None:
    assert len(intervals) == len(pairs) == 6
    assert [name for name, (low, high) in intervals.items() if not low < 0 < high] == ["cot, rope"]
    assert intervals["cot, rope"][0] > 0


def the_far_window_is_not_found(by_kind: Any) -> None:
    assert all(near > 50 and away < 7 for near, away in by_kind.values())


def rounding_removes_dips(dips: Any) -> None:
    assert len(dips["rope"]) > 3 and len(dips["yarn"]) > 0
    assert len(dips["resonance_rope"]) == len(dips["resonance_yarn"]) == 0


def a_learned_window_does_not_reach_further(learned: Any, window: Any) -> None:
    assert learned and all(line["subtask"] == "semi-recursive" for line in learned)
    for curve in window.values():
        assert 0.03 < curve[80:].mean() < 0.1


def rounding_closes_a_small_part_of_the_gap(settings: Any, gap: Any, total: Any) -> None:
    critical = settings.frequencies(settings.readings(["resonance_rope"])[0], scaled=True).critical_pairs(65)
    assert np.allclose(gap("resonance_rope")[:critical], 0) and gap("rope")[:critical].min() > 1e-6
    assert 0 < total["rope"] - total["resonance_rope"] < 0.05 * total["rope"]
    assert total["yarn"] < 0.05 * total["rope"]
    assert 0.4 < total["resonance_yarn"] / total["yarn"] < 0.6
