"""The committed results of PosGen: they are those of a preset, complete, and agree with their own counts."""

from dataclasses import replace
from pathlib import Path

from mlx_resonance.posgen import sweep
from mlx_resonance.posgen.settings import BASES, PRESETS
from mlx_resonance.posgen.sweep import read_results
from mlx_resonance.posgen.tasks import Task

import pytest

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("posgen-*.jsonl"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_results_are_those_of_a_preset(path) -> None:
    """So that the same command goes on with them, and every plain model has its rounded twin."""
    found, lines = read_results(path)
    scaled = {"train_scaled": True, "ramps": (65,)}
    changes: dict[str, dict] = {"": {}, "-official": {"split": "official"}, "-train-scaled": scaled}
    changed = changes[path.stem.removeprefix(f"posgen-{found['preset']}")]
    assert sweep.from_header(path, found) == (replace(PRESETS[found["preset"]], **changed), Task("recursive"))
    keys = {tuple(line[name] for name in sweep.KEY) for line in lines}
    assert len(keys) == len(lines) > 0
    plain = {key for key in keys if key[1] in BASES}
    assert {(subtask, f"resonance_{encoding}", *rest) for subtask, encoding, *rest in plain} == keys - plain
    for line in lines:  # the summary follows from the counts
        for measured in (line, line["last"]):
            correct, trained = measured["correct"], measured["trained"]
            assert measured["id"] == pytest.approx(sum(correct[:60]) / 60 / line["rows"], abs=1e-6)
            assert measured["ood"] == pytest.approx(sum(correct[60:]) / 192 / line["rows"], abs=1e-6)
            assert measured["trained_id"] == pytest.approx(sum(trained[1:]) / 59 / line["rows"], abs=1e-6)
