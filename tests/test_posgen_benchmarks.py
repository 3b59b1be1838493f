"""What `benchmarks/posgen.py` and `posgen_why.py` make of results, on trainings of a second and on given numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.posgen.settings import PRESETS, Reading
from mlx_resonance.posgen.tasks import Task
from mlx_resonance.run_log import RunLog

import numpy as np
import pytest

SMOKE = PRESETS["smoke"]


@pytest.fixture
def why(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setitem(PRESETS, "shortcut", SMOKE)
    import posgen_why

    return posgen_why


def run_of(why: ModuleType, rounding: str, different: int = 0) -> Any:
    return why.Variant(Task("semi-recursive"), SMOKE, SMOKE.readings(("rope", "yarn")), 5549, rounding, different)


def test_every_cell_is_read_with_its_own_rounding(why: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    """The counts here tell the wavelengths that a model was read with."""
    monkeypatch.setattr(why, "teacher_forced", lambda model, rope, rows, task: np.array([rope.frequencies.wavelengths]))
    log = RunLog(tmp_path / "why.jsonl", "posgen-why", {}, key=why.KEY)
    run = run_of(why, "none")
    why.measure(run, log)
    assert [(line["read"], line["encoding"]) for line in log.records] == [
        ("none", "rope"), ("none", "yarn"), ("all", "rope"), ("all", "yarn"),
    ]  # fmt: skip
    for line in log.records:
        trained = run.frequencies(Reading("rope"), False, line["read"]).wavelengths.tolist()
        tested = run.frequencies(Reading(line["encoding"], line["ramp"]), True, line["read"]).wavelengths.tolist()
        assert line["seen"] == line["unseen"] == [trained] and line["correct"] == [tested]
    assert log.records[0]["seen"] != log.records[2]["seen"]
    assert [path.name for path in tmp_path.iterdir()] == ["why.jsonl"]


def test_nothing_is_trained_twice(why: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    """Not what another process has added meanwhile, either; and no variant takes another one's checkpoint."""
    path, runs = tmp_path / "why.jsonl", [run_of(why, "all"), run_of(why, "others"), run_of(why, "all", 10)]
    log, other = (RunLog(path, "posgen-why", {}, key=why.KEY) for _ in range(2))
    for run in runs:
        why.measure(run, other)
    monkeypatch.setattr(why, "run_training", None)
    left = [why.checkpoint_of(path, run, run.rounding, run.different) for run in runs]
    assert len(set(left)) == 3
    left[0].touch()  # of a run that was killed after its last line
    for run in runs:
        why.measure(run, log)
    assert len(log.records) == 6 and not left[0].exists()


def test_changes_are_paired_by_seed(why: ModuleType) -> None:
    """From no rounding on as many sequences, and from as much rounding on all of them."""
    near = Task("semi-recursive").kinds(SMOKE.test_length) == "near"
    inside = SMOKE.train_length - 4

    def line(trained: str, different: int, seed: int, right: int, read: str = "") -> dict[str, Any]:
        counts = np.where(near, right, 0).tolist()
        return {
            "trained": trained, "read": read or trained, "different": different, "encoding": "rope", "ramp": 0,
            "seed": seed, "rows": 10, "correct": counts, "seen": counts[:inside], "unseen": [1] * inside,
        }  # fmt: skip

    lines = [line("none", 0, 1, 2), line("none", 0, 2, 3), line("all", 0, 1, 6), line("all", 0, 2, 8)]
    lines += [line("none", 0, 1, 1, read="all"), line("none", 10, 1, 4), line("all", 10, 1, 5)]
    found = why.summarize(lines)
    assert list(found) == ["none", "all", "all, after training", "none, 10 sequences", "all, 10 sequences"]
    whole = found["all"]["rope"]
    assert whole["change"]["difference"] == pytest.approx(45) and whole["change"]["seeds"] == 2
    assert whole["change"]["p_holm"] == whole["change"]["p"] and "memory" not in whole
    assert (whole["correct_near"], whole["correct_far"], whole["unseen_near"]) == pytest.approx((70, 0, 10))
    assert found["all, after training"]["rope"]["change"]["difference"] == pytest.approx(-10)
    assert "change" not in found["none"]["rope"] and "change" not in found["none, 10 sequences"]["rope"]
    assert found["none, 10 sequences"]["rope"]["memory"]["difference"] == pytest.approx(20)
    few = found["all, 10 sequences"]["rope"]
    assert (few["change"]["difference"], few["memory"]["difference"]) == pytest.approx((10, -10))
    shown = why.table(found)
    assert "| rounded | seeds | within: seen, unseen | past: `rope` | dips |" in shown
    assert (
        "| all | 2 | 70.0, 10.0 | 70.0; +45.0 [" in shown
        and "| all, 10 sequences | 1 | 50.0, 10.0 | 50.0; +10.0; from all -10.0 |" in shown
    )


def test_readings_share_the_time_of_their_training(why: ModuleType) -> None:
    import posgen

    lines = [
        {"subtask": "cot", "encoding": encoding, "ramp": 65 * ("yarn" in encoding), "seed": seed, "seconds": seconds}
        for seed in (1, 2)
        for prefix, seconds in (("", 60.0), ("resonance_", 120.0))
        for encoding in (f"{prefix}rope", f"{prefix}ntk", f"{prefix}yarn")
    ]
    assert posgen.minutes(PRESETS["learned"], lines) == 6


def test_the_gap_is_ranked_against_the_accuracy(why: ModuleType, tmp_path: Path) -> None:
    """Of all pairs together; two readings have no rank."""
    import posgen

    gap = {"rope": (1, 18), "ntk": (2, 9), "yarn/65": (0.5, 0.5), "yarn/257": (1, 5)}
    gaps = {reading: {"pairs": 9, "pre_critical": pre, "others": others} for reading, (pre, others) in gap.items()}
    of = {"rope": 20.0, "ntk": 70.0, "yarn/65": 90.0, "yarn/257": 60.0}
    accuracy = {reading: {"ood": value} for reading, value in of.items()}
    pair = {reading: accuracy[reading] for reading in ("rope", "ntk")}
    summary = {"feature_gap": gaps, "table": {"cot": accuracy, "recursive": pair}}
    found = posgen.against_gap(summary)
    assert found["cot"]["points"] == {"rope": (19, 20), "ntk": (11, 70), "yarn/65": (1, 90), "yarn/257": (6, 60)}
    assert found["cot"]["rank"] == pytest.approx(-0.8) and found["recursive"]["rank"] is None
    posgen.draw_gaps({"run": {"against_gap": found}}, str(tmp_path / "gaps.svg"))
    with pytest.raises(UsageError, match="no subtask has three readings"):
        posgen.draw_gaps({"run": {"against_gap": {"recursive": found["recursive"]}}}, str(tmp_path / "none.svg"))
    same = {"feature_gap": gaps, "table": {"cot": {reading: {"ood": 5.0} for reading in of}}}
    assert posgen.against_gap(same)["cot"]["rank"] is None
    drawn = (tmp_path / "gaps.svg").read_text()
    assert "rank corr. -0.80" in drawn.replace("−", "-") and "recursive" not in drawn


def test_dips_are_single_positions_among_better_ones(why: ModuleType) -> None:
    """A fall of the whole curve is none; only near tokens past the training length count, paired by seed."""
    import posgen

    settings = PRESETS["learned"]
    falling = np.linspace(1, 0.2, 96)
    assert not posgen.dips(falling).any()
    dented = falling.copy()
    dented[[10, 50]] -= 0.25
    dented[30] -= 0.15
    assert np.flatnonzero(posgen.dips(dented)).tolist() == [10, 50]
    depth = 0.25 - 0.8 / 95  # the median of nine is the next lower one
    assert posgen.dips(dented)[10] == pytest.approx(depth)
    kinds = Task("semi-recursive").kinds(settings.test_length)
    past = np.flatnonzero((kinds == "near") & (np.arange(252) >= 60))

    def line(encoding: str, seed: int, accuracies: np.ndarray) -> dict[str, Any]:
        correct = np.where(np.arange(252) % 7 == 0, 0, 1000)
        correct[past] = np.rint(1000 * accuracies)
        common = {"subtask": "semi-recursive", "encoding": encoding, "ramp": 0, "seed": seed, "rows": 1000}
        return common | {"last": {"correct": correct.tolist()}}

    header = {"settings": asdict(settings), "task": {"arithmetic": "mod_addition", "modulus": 17, "near": 3, "far": 1}}
    lines = [line("rope", 1, dented), line("rope", 2, dented), line("rope", 3, dented)]
    lines += [line("resonance_rope", 1, falling), line("resonance_rope", 2, dented)]
    pair = posgen.pairs_of_dips(header, lines, "last")["semi-recursive"]["rope"]
    assert (pair["seeds"], pair["plain"]) == (2, pytest.approx(100 * 2 / 96))
    assert (pair["rounded"], pair["difference"]) == pytest.approx((100 / 96, -100 / 96))
    assert pair["with_any"] == [2, 1] and pair["worth"] == pytest.approx(100 * 2 * depth / 96, abs=1e-3)
    assert pair["positions"] == (5 + past[[10, 50]]).tolist() == [86, 166]
    shown = posgen.table_of_dips({"run": {"dips": {"semi-recursive": {"rope": pair}}}})
    assert (
        "| run | semi-recursive | `rope` | 2 | 2.1 | 1.0 | -1.0 [" in shown and "] | 2 and 1 | 0.5 | 86, 166 |" in shown
    )


def test_only_seeds_that_learned(why: ModuleType) -> None:
    """A seed goes with both of its models, of its subtask alone, by the weights that are asked for."""
    import posgen

    def line(subtask: str, encoding: str, seed: int, best: float, last: float) -> dict[str, Any]:
        common = {"subtask": subtask, "encoding": encoding, "seed": seed, "trained_id": best}
        return common | {"last": {"trained_id": last}}

    lines = [line("cot", "rope", 1, 0.99, 0.5), line("cot", "resonance_rope", 1, 0.99, 0.99)]
    lines += [line("cot", "rope", 2, 1.0, 0.99), line("cot", "resonance_rope", 2, 0.98, 0.99)]
    lines += [line("recursive", "rope", 2, 1.0, 1.0), {"subtask": "recursive", "encoding": "rope", "seed": 3}]
    assert posgen.of_learned(lines, "best") == [*lines[:2], lines[4]]
    assert posgen.of_learned(lines[:5], "last") == lines[2:5]
