"""PosGen's sweep and report, on the preset that takes a second."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from mlx_resonance.errors import UsageError
from mlx_resonance.plots import plot_posgen
from mlx_resonance.posgen import sweep
from mlx_resonance.posgen.report import PAPER, accuracy_curves, paired_bootstrap, summarize
from mlx_resonance.posgen.settings import ENCODINGS, PRESETS
from mlx_resonance.posgen.sweep import header, read_results, run_sweep
from mlx_resonance.posgen.tasks import SUBTASKS, Task

import numpy as np
import pytest
from matplotlib.axes import Axes

SMOKE = PRESETS["smoke"]
TASK = Task("recursive")
VARIES = {"seconds"}


def without(lines: list[dict]) -> list[str]:
    return sorted(json.dumps({name: line[name] for name in line if name not in VARIES}) for line in lines)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "smoke.jsonl"
    lines = run_sweep(output, "smoke", SMOKE, TASK, seeds=(1, 2))
    return output, lines


def test_a_sweep_runs_everything_once(swept) -> None:
    output, lines = swept
    assert {(line["subtask"], line["encoding"], line["seed"]) for line in lines} == {
        (subtask, encoding, seed) for subtask in SUBTASKS for encoding in ENCODINGS for seed in (1, 2)
    }
    assert len(lines) == 48
    assert read_results(output)[0] == {"posgen": 1} | json.loads(json.dumps(header("smoke", SMOKE, TASK)))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    before = output.read_bytes()
    assert run_sweep(output, "smoke", SMOKE, TASK, seeds=(1, 2), on_run=lambda *_: pytest.fail("ran")) == lines
    assert output.read_bytes() == before


def test_a_sweep_runs_what_is_missing(swept, tmp_path) -> None:
    output, lines = swept
    text = output.read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    kept = [line for line in text if '"semi-recursive", "encoding": "ntk"' not in line]
    part.write_text("".join(kept) + text[-1][:50])  # and a line that a killed run did not finish
    runs = []
    again = run_sweep(part, "smoke", SMOKE, TASK, seeds=(1, 2), on_run=lambda run, *_: runs.append(run))
    assert [(run.task.subtask, run.encodings, run.seed) for run in runs] == [
        ("semi-recursive", ("ntk",), 1), ("semi-recursive", ("ntk",), 2),
    ]  # fmt: skip
    assert without(again) == without(lines)


def test_a_sweep_of_other_settings_is_refused(swept) -> None:
    output, _ = swept
    before = output.read_bytes()
    for settings, task, name in (
        (replace(SMOKE, epochs=3), TASK, "epochs is 2 there and 3 here"),
        (replace(SMOKE, train_scaled=True), TASK, "train_scaled is false there and true here"),
        (replace(SMOKE, model=replace(SMOKE.model, layers=2)), TASK, "layers is 1 there and 2 here"),
        (SMOKE, replace(TASK, modulus=16), "modulus is 17 there and 16 here"),
    ):
        with pytest.raises(UsageError, match=name):
            run_sweep(output, "smoke", settings, task, seeds=(1,))
    with pytest.raises(UsageError, match='preset is "smoke" there and "laptop" here'):
        run_sweep(output, "laptop", SMOKE, TASK, seeds=(1,))
    assert output.read_bytes() == before


def test_a_sweep_survives_being_killed(swept, tmp_path) -> None:
    _, lines = swept
    output = tmp_path / "killed.jsonl"
    code = (
        "import sys; from pathlib import Path; from mlx_resonance.posgen.settings import PRESETS\n"
        "from mlx_resonance.posgen.sweep import run_sweep; from mlx_resonance.posgen.tasks import Task\n"
        "run_sweep(Path(sys.argv[1]), 'smoke', PRESETS['smoke'], Task('recursive'), seeds=(1, 2))"
    )
    for wanted in (3, 20):  # lines in the file when the process is killed
        process = subprocess.Popen([sys.executable, "-c", code, str(output)], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 240
        while not (output.exists() and output.read_bytes().count(b"\n") >= wanted):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.communicate() and process.returncode == -signal.SIGKILL
    assert 20 <= output.read_bytes().count(b"\n") < 49
    assert without(run_sweep(output, "smoke", SMOKE, TASK, seeds=(1, 2))) == without(lines)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_a_sweep_clears_what_was_left_after_its_last_line(swept, tmp_path) -> None:
    """A sweep that was killed after it wrote a run's results and before it deleted the checkpoint."""
    output, lines = swept
    again = tmp_path / output.name
    again.write_bytes(output.read_bytes())
    for run in sweep.runs_left(SMOKE, TASK, SUBTASKS, ENCODINGS, (1, 2)):
        sweep._checkpoint(again, run).touch()
    assert len(os.listdir(tmp_path)) == 1 + 12
    assert run_sweep(again, "smoke", SMOKE, TASK, seeds=(1, 2)) == lines
    assert os.listdir(tmp_path) == [again.name]


def test_what_is_asked_for_twice_runs_once(tmp_path) -> None:
    runs = []
    lines = run_sweep(
        tmp_path / "twice.jsonl", "smoke", SMOKE, TASK, subtasks=("cot", "cot"), encodings=("rope", "yarn", "rope"),
        seeds=(1, 2, 1), on_run=lambda run, *_: runs.append(run),
    )  # fmt: skip
    assert [(run.encodings, run.seed) for run in runs] == [(("rope", "yarn"), 1), (("rope", "yarn"), 2)]
    assert sorted((line["encoding"], line["seed"]) for line in lines) == [
        ("rope", 1), ("rope", 2), ("yarn", 1), ("yarn", 2),
    ]  # fmt: skip


def test_two_sweeps_write_one_file(tmp_path) -> None:
    """At the same time, with different subtasks; a result that both have is written once."""
    output = tmp_path / "shared.jsonl"

    def other(run, number, count) -> None:
        for subtask in ("cot", "recursive"):
            run_sweep(output, "smoke", SMOKE, TASK, subtasks=(subtask,), encodings=("rope",), seeds=(1,))

    lines = run_sweep(
        output, "smoke", SMOKE, TASK, subtasks=("recursive",), encodings=("yarn", "rope"), seeds=(1,), on_run=other
    )
    keys = [(line["subtask"], line["encoding"]) for line in read_results(output)[1]]
    assert sorted(keys) == [("cot", "rope"), ("recursive", "rope"), ("recursive", "yarn")]
    assert len(lines) == 3 and os.listdir(tmp_path) == [output.name]


# Changes of a line, or of the header, to values that no run writes.
BROKEN = {
    "nan": {"ood": float("nan")}, "infinite": {"id": float("inf")}, "above one": {"generated_ood": 1.5},
    "below zero": {"continued_ood": -0.1}, "a text": {"generated_id": "0.5"}, "nothing": {"ood": None},
    "a list for a seed": {"seed": [1]}, "a list for an encoding": {"encoding": ["rope"]},
    "another subtask": {"subtask": "nested"}, "another encoding": {"encoding": "alibi"}, "no rows": {"rows": 0},
    "more right than there are": {"rows": 1, "correct": [2] * 20}, "fewer positions": {"correct": [1] * 19},
    "no correct": {"correct": ...}, "no step": {"step": ...}, "a large seed": {"seed": 2**32},
    "no list": {"correct": 20}, "counts of text": {"correct": ["1"] * 20}, "negative": {"correct": [-1] * 20},
}  # fmt: skip
HEADERS = {
    "no task": {"task": None}, "no settings": {"settings": {}}, "no preset": {"preset": ...},
    "another key": {"task": {"modulus": 17, "nearby": 3}}, "a modulus of one": {"task": {"modulus": 1}},
    "text for a number": {"task": {"modulus": "17"}},
    "no batch": {"settings": asdict(replace(SMOKE, batch_size=8)) | {"batch_size": 0}},
}  # fmt: skip


def broken(path, output, change: dict, number: int):
    """A copy of a results file with one line changed; ... removes a field."""
    texts = output.read_text().splitlines()
    line = {name: value for name, value in (json.loads(texts[number]) | change).items() if value is not ...}
    texts[number] = json.dumps(line)
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named(swept, tmp_path, name) -> None:
    path = broken(tmp_path / "broken.jsonl", swept[0], BROKEN[name], 3)
    before = path.read_bytes()
    wrong = list(BROKEN[name])[-1]
    for call in (lambda: read_results(path), lambda: run_sweep(path, "smoke", SMOKE, TASK, seeds=(1,))):
        with pytest.raises(UsageError, match=rf"line 4(: {wrong} cannot be| has no '{wrong}' that is) "):
            call()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_header_is_refused(swept, tmp_path, name) -> None:
    path = broken(tmp_path / "broken.jsonl", swept[0], HEADERS[name], 0)
    with pytest.raises(UsageError, match=r"broken\.jsonl does not say the settings of a run"):
        read_results(path)


@pytest.mark.parametrize("name", ["posgen-laptop.jsonl", "posgen-laptop-train-scaled.jsonl"])
def test_the_committed_results_are_read(name) -> None:
    found, lines = read_results(Path(__file__).parents[1] / "benchmarks" / "results" / name)
    assert sweep.from_header(Path(name), found) == (
        replace(PRESETS["laptop"], train_scaled="scaled" in name), Task("recursive"),
    )  # fmt: skip
    assert len(lines) == (90 if "scaled" in name else 120)
    for line in lines:  # the summary follows from the counts
        assert line["id"] == pytest.approx(sum(line["correct"][:60]) / 60 / line["rows"], abs=1e-6)
        assert line["ood"] == pytest.approx(sum(line["correct"][60:]) / 192 / line["rows"], abs=1e-6)


# --- report


def fake(subtask: str, encoding: str, seed: int, ood: float) -> dict:
    return {
        "subtask": subtask, "encoding": encoding, "seed": seed, "id": 1.0, "ood": ood, "correct": [4, 2], "rows": 4,
        "generated_id": 0.5, "generated_ood": 0.25, "continued_ood": 0.75,
    }  # fmt: skip


def test_summary() -> None:
    plain, resonant = (0.1, 0.2, 0.6), (0.3, 0.2, 0.8)
    lines = [fake("cot", "yarn", seed, value) for seed, value in enumerate(plain)]
    lines += [fake("cot", "resonance_yarn", 2 - seed, value) for seed, value in enumerate(resonant[::-1])]
    lines += [fake("recursive", "rope", 1, 0.5)]
    summary = summarize(lines)
    assert list(summary["table"]) == ["recursive", "cot"]
    row = summary["table"]["cot"]["yarn"]
    assert row["seeds"] == 3 and row["paper"] == PAPER["cot"]["yarn"] == 98.71
    assert row["ood"] == pytest.approx(30) and row["ood_variance"] == pytest.approx(700)
    assert row["ood_std"] == pytest.approx(700**0.5) and row["continued_ood"] == pytest.approx(75)
    assert summary["table"]["recursive"]["rope"]["ood_std"] is None
    pair = summary["pairs"]["cot"]["yarn"]
    assert pair["difference"] == pytest.approx(40 / 3)  # paired by seed, not by order: +20, 0, +20
    assert 0 <= pair["low"] < pair["difference"] < pair["high"] <= 20 + 1e-9
    assert summary["pairs"]["recursive"] == {}
    json.dumps(summary, allow_nan=False)


def test_bootstrap_covers_as_it_says() -> None:
    """In many experiments whose true difference is 1, about 95 % of the intervals contain it (fewer with few seeds)."""
    random = np.random.default_rng(11)
    held = 0
    for _ in range(400):
        interval = paired_bootstrap(random.normal(1, 2, size=30))
        held += interval["low"] <= 1 <= interval["high"]
    assert 356 <= held <= 388  # 89 % to 97 %
    assert paired_bootstrap(np.array([0.5]))["low"] is None


def test_figure(swept, tmp_path, monkeypatch) -> None:
    _, lines = swept
    curves = accuracy_curves(lines)
    assert list(curves) == list(SUBTASKS) and list(curves["cot"]) == list(ENCODINGS)
    assert curves["cot"]["rope"].shape == (SMOKE.test_length - 4,)
    drawn, marks = [], []
    plot, mark = Axes.plot, Axes.axvline
    monkeypatch.setattr(Axes, "plot", lambda axis, *a, **k: drawn.append(a[:2]) or plot(axis, *a, **k))
    monkeypatch.setattr(Axes, "axvline", lambda axis, x, **k: marks.append(x) or mark(axis, x, **k))
    plot_posgen(curves, 4, SMOKE.train_length, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("resonance_yarn") >= 1
    assert marks == [SMOKE.train_length + 0.5] * 3 and len(drawn) == 24
    positions, accuracy = drawn[0]  # digits 5 and 6 are the first point, 23 and 24 the last
    assert (positions[0], positions[-1]) == (5.5, 23.5)
    assert accuracy[0] == pytest.approx(50 * (curves["recursive"]["rope"][0] + curves["recursive"]["rope"][1]))
