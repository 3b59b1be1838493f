"""The committed results of PosGen: all that the docs' command trains, no other ones, in agreement with their counts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_resonance.errors import UsageError
from mlx_resonance.posgen import sweep
from mlx_resonance.posgen.settings import PRESETS
from mlx_resonance.posgen.sweep import read_results

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("posgen-*.jsonl"))


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import posgen_train

    return posgen_train


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_results_are_those_that_the_command_trains(path: Path, training: ModuleType) -> None:
    """So that the same command goes on with them, and trains nothing where all are there."""
    found, lines = read_results(path)
    wanted = training.SWEEPS[path.stem]
    assert (found["preset"], *sweep.from_header(path, found)) == (wanted.preset, wanted.settings, training.TASK)
    keys = [tuple(line[name] for name in sweep.KEY) for line in lines]
    assert sorted(keys) == sorted(wanted.keys())
    for line in lines:  # the summary follows from the counts
        for measured in (line, line["last"]):
            correct, trained = measured["correct"], measured["trained"]
            assert measured["id"] == pytest.approx(sum(correct[:60]) / 60 / line["rows"], abs=1e-6)
            assert measured["ood"] == pytest.approx(sum(correct[60:]) / 192 / line["rows"], abs=1e-6)
            assert measured["trained_id"] == pytest.approx(sum(trained[1:]) / 59 / line["rows"], abs=1e-6)


def test_every_log_of_the_command_is_committed(training: ModuleType) -> None:
    assert set(training.SWEEPS) == {path.stem for path in RESULTS}


def test_the_command_trains_what_a_log_lacks(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    small = training.Sweep("smoke", {"cot": 2, "recursive": 1}, {"ramps": (17,)}, ("yarn", "resonance_yarn"))
    monkeypatch.setitem(training.SWEEPS, "posgen-smoke", small)
    assert training.train("posgen-smoke", tmp_path) == 6
    capsys.readouterr()
    before = (tmp_path / "posgen-smoke.jsonl").read_bytes()
    assert training.train("posgen-smoke", tmp_path) == 6
    assert (tmp_path / "posgen-smoke.jsonl").read_bytes() == before and capsys.readouterr().err == ""
    _, lines = read_results(tmp_path / "posgen-smoke.jsonl")
    assert sorted(tuple(line[name] for name in sweep.KEY) for line in lines) == sorted(small.keys())
    assert {line["seed"] for line in lines if line["subtask"] == "recursive"} == {5549}
    assert small.settings.model == PRESETS["smoke"].model and small.settings.ramps == (17,)


def test_a_name_of_no_log_is_refused(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["posgen_train.py", "posgen-laptop"])
    with pytest.raises(UsageError, match="posgen-laptop"):
        training.main()
