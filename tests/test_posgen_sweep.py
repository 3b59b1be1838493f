"""PosGen's sweep and report, on the preset that takes a second."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

from mlx_resonance.errors import UsageError
from mlx_resonance.plots import plot_posgen
from mlx_resonance.posgen import sweep
from mlx_resonance.posgen.report import accuracy_curves, adjust, figure_of, paired, summarize
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
    assert [(run.task.subtask, run.readings, run.seed) for run in runs] == [
        ("semi-recursive", (("ntk", 0),), 1), ("semi-recursive", (("ntk", 0),), 2),
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
        sweep.checkpoint_of(again, run).touch()
    assert len(os.listdir(tmp_path)) == 1 + 12
    assert run_sweep(again, "smoke", SMOKE, TASK, seeds=(1, 2)) == lines
    assert os.listdir(tmp_path) == [again.name]


def test_what_is_asked_for_twice_runs_once(tmp_path) -> None:
    runs = []
    lines = run_sweep(
        tmp_path / "twice.jsonl", "smoke", SMOKE, TASK, subtasks=("cot", "cot"), encodings=("rope", "yarn", "rope"),
        seeds=(1, 2, 1), on_run=lambda run, *_: runs.append(run),
    )  # fmt: skip
    assert [(run.readings, run.seed) for run in runs] == [((("rope", 0), ("yarn", 13)), seed) for seed in (1, 2)]
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
    "YaRN without a ramp": {"encoding": "yarn", "ramp": 0}, "a ramp without YaRN": {"encoding": "rope", "ramp": 13},
    "learned above one": {"trained_id": 7.0}, "learned of text": {"trained_id": "0.5"}, "first of text": {"first": "a"},
    "too few of the training": {"trained": [1]}, "the training of text": {"trained": "x"}, "no last": {"last": [1]},
}  # fmt: skip
HEADERS = {
    "no task": {"task": None}, "no settings": {"settings": {}}, "no preset": {"preset": ...},
    "another key": {"task": {"modulus": 17, "nearby": 3}}, "a modulus of one": {"task": {"modulus": 1}},
    "text for a number": {"task": {"modulus": "17"}},
    "no batch": {"settings": asdict(replace(SMOKE, batch_size=8)) | {"batch_size": 0}},
}  # fmt: skip


BROKEN_LAST = {"above one": {"ood": 2.0}, "more right than there are": {"trained": [99] * 8}, "text": {"first": "a"}}


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


@pytest.mark.parametrize("name", BROKEN_LAST)
def test_broken_measures_of_the_last_step_are_named(swept, tmp_path, name) -> None:
    last = json.loads(swept[0].read_text().splitlines()[3])["last"]
    path = broken(tmp_path / "broken.jsonl", swept[0], {"last": last | BROKEN_LAST[name]}, 3)
    with pytest.raises(UsageError, match=f"line 4: {next(iter(BROKEN_LAST[name]))} cannot be"):
        read_results(path)


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_header_is_refused(swept, tmp_path, name) -> None:
    path = broken(tmp_path / "broken.jsonl", swept[0], HEADERS[name], 0)
    with pytest.raises(UsageError, match=r"broken\.jsonl does not say the settings of a run"):
        read_results(path)


# --- report


def fake(subtask: str, encoding: str, seed: int, ood: float, learned: float = 1.0, **more) -> dict:
    """A line of four predictions within the training length and six past it, of which half the rows are right."""
    return {
        "subtask": subtask, "encoding": encoding, "ramp": 65 * encoding.endswith("yarn"), "seed": seed, "id": 1.0,
        "ood": ood, "correct": [4] * 4 + [2] * 6, "rows": 4, "generated_id": 0.5, "generated_ood": 0.25,
        "continued_ood": 0.75, "trained_id": learned, "first": 0.5,
    } | more  # fmt: skip


SMALL = header("small", replace(SMOKE, train_length=8, test_length=14), TASK)


def test_summary() -> None:
    plain, resonant = (0.1, 0.2, 0.6), (0.3, 0.2, 0.8)
    lines = [fake("cot", "yarn", seed, value) for seed, value in enumerate(plain)]
    lines += [fake("cot", "resonance_yarn", 2 - seed, value) for seed, value in enumerate(resonant[::-1])]
    lines += [fake("recursive", "rope", 1, 0.5)]
    summary = summarize(SMALL, lines)
    assert list(summary["table"]) == ["recursive", "cot"]
    assert list(summary["table"]["cot"]) == ["yarn/65", "resonance_yarn/65"]
    row = summary["table"]["cot"]["yarn/65"]
    assert row["seeds"] == 3 and row["paper"] is None  # of other lengths
    assert row["ood"] == pytest.approx(30) and row["ood_variance"] == pytest.approx(700)
    assert row["ood_std"] == pytest.approx(700**0.5) and row["continued_ood"] == pytest.approx(75)
    assert (row["trained_id"], row["first"], row["near"], row["far"]) == (100, 50, 50, None)
    assert summary["table"]["recursive"]["rope"]["ood_std"] is None
    pair = summary["pairs"]["cot"]["yarn/65"]
    assert pair["difference"] == pytest.approx(40 / 3)  # paired by seed, not by order: +20, 0, +20
    # Student's t of two degrees of freedom is 4.3027 at 97.5 %; the standard error is 20/3.
    assert pair["low"] == pytest.approx(40 / 3 - 4.3027 * 20 / 3, abs=1e-3)
    assert pair["high"] == pytest.approx(40 / 3 + 4.3027 * 20 / 3, abs=1e-3)
    assert pair["p"] == pair["p_holm"] == pytest.approx(0.18350, abs=1e-5)  # t = 2: 1 - 2/√6
    assert summary["pairs"]["recursive"] == {}
    json.dumps(summary, allow_nan=False)


def test_near_and_far_tokens_are_apart() -> None:
    """Of the digits 8 to 13 of a semi-recursive row, the window has moved for 8, 10 and 12."""
    counts = [4, 4, 4, 4, 1, 4, 0, 3, 2, 2]
    line = fake("semi-recursive", "rope", 1, 0.5, correct=counts, trained=[1, 4, 2, 3])
    summary = summarize(SMALL, [line])
    row = summary["table"]["semi-recursive"]["rope"]
    assert row["far"] == pytest.approx(100 * (1 + 0 + 2) / 12) and row["near"] == pytest.approx(100 * (4 + 3 + 2) / 12)
    assert (row["trained_near"], row["trained_far"]) == (87.5, 50)
    limits = summary["bounds"]["semi-recursive"]
    assert limits["near"]["ceiling"] == pytest.approx(100, abs=1)
    assert limits["far"]["ceiling"] == pytest.approx(100 / 17, abs=1.5)
    assert limits["all"]["ceiling"] == pytest.approx((100 + 100 / 17) / 2, abs=1)
    assert limits["all"]["chance"] == pytest.approx(100 / 17, abs=1.5)


def test_a_model_that_has_not_learned_is_marked() -> None:
    below = {}
    for learned in ((0.99, 1.0), (0.9899, 1.0)):
        lines = [fake("cot", "ntk", seed, 0.5, learned=value) for seed, value in enumerate(learned)]
        below[learned] = summarize(SMALL, lines)["table"]["cot"]["ntk"]["below"]
    assert list(below.values()) == [0, 1]
    del lines[1]["trained_id"]  # results of an earlier version
    assert summarize(SMALL, lines)["table"]["cot"]["ntk"]["below"] is None
    assert figure_of(SMALL, lines)[2] == {"cot": {"ntk"}}


def test_the_last_weights_beside_the_best() -> None:
    last = {"id": 0.5, "ood": 0.125, "trained_id": 0.25, "first": 0.0, "correct": [2] * 4 + [1] * 6}
    lines = [fake("cot", "rope", 1, 0.5, last=last)]
    best, after = (summarize(SMALL, lines, weights)["table"]["cot"]["rope"] for weights in ("best", "last"))
    assert (best["ood"], best["trained_id"], best["near"]) == (50, 100, 50)
    assert (after["ood"], after["trained_id"], after["near"]) == (12.5, 25, 25)
    assert figure_of(SMALL, lines, "last")[0]["cot"]["rope"].tolist() == [0.5] * 4 + [0.25] * 6


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """In many experiments of five seeds whose true difference is 1, about 95 % of the intervals contain it."""
    random = np.random.default_rng(11)
    intervals = [paired(random.normal(1, 2, size=5)) for _ in range(400)]
    held = sum(interval["low"] <= 1 <= interval["high"] for interval in intervals)
    assert 368 <= held <= 392  # 92 % to 98 %
    assert paired(np.array([0.5]))["low"] is None
    assert paired(np.array([0.5, 0.5]))["p"] is None  # nothing varies: no test


def test_p_values_are_adjusted_for_the_table() -> None:
    """Holm's example of four: the smallest is multiplied by 4, the next by 3, and none falls below one before it."""
    pairs = [{"p": p, "seeds": 5} for p in (0.03, 0.005, 0.04, 0.01)] + [{"p": None, "seeds": 1}]
    adjust(pairs)
    assert [pair["p_holm"] for pair in pairs] == [*map(pytest.approx, (0.06, 0.02, 0.06, 0.03)), None]


def test_rows_without_a_difference_are_comparisons_too() -> None:
    values = [[3.0, 5, 4, 6, 2], [0.0] * 5, [1.0] * 5, [2.0]]
    pairs = [paired(np.array(of_seeds)) for of_seeds in values]
    adjust(pairs)
    assert [pair["p"] for pair in pairs[1:]] == [1, None, None]
    assert pairs[0]["p_holm"] == pytest.approx(3 * pairs[0]["p"]) and pairs[1]["p_holm"] == 1


def test_figure(swept, tmp_path, monkeypatch) -> None:
    output, lines = swept
    curves = accuracy_curves(lines)
    assert list(curves) == list(SUBTASKS)
    assert set(curves["cot"]) == {*ENCODINGS} - {"yarn", "resonance_yarn"} | {
        "yarn/13", "resonance_yarn/13",
    }  # fmt: skip
    assert curves["cot"]["rope"].shape == (SMOKE.test_length - 4,)
    drawn, marks = [], []
    plot, mark = Axes.plot, Axes.axvline
    monkeypatch.setattr(Axes, "plot", lambda axis, *a, **k: drawn.append((*a[:2], k)) or plot(axis, *a, **k))
    monkeypatch.setattr(Axes, "axvline", lambda axis, x, **k: marks.append(x) or mark(axis, x, **k))
    plot_posgen(*figure_of(read_results(output)[0], lines), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("resonance_yarn") >= 1
    # One panel for each subtask's near tokens, one for the far tokens of semi-recursive sequences.
    assert marks == [SMOKE.train_length + 0.5] * 4 and len(drawn) == 4 * 8
    assert all(options["alpha"] < 1 for *_, options in drawn)  # nothing has learned anything
    (near, *_), (far, accuracy, _) = drawn[16], drawn[24]
    assert near.tolist() == list(range(6, 25, 2)) and far.tolist() == list(range(7, 24, 2))  # digits, from 1
    assert accuracy == pytest.approx(100 * curves["semi-recursive"]["rope"][2::2])
