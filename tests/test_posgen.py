"""PosGen's training, evaluation, sweep, report and commands, on the preset that takes a second."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

from mlx_resonance import frequencies
from mlx_resonance.plots import plot_posgen
from mlx_resonance.posgen import settings as posgen_settings
from mlx_resonance.posgen.evaluate import generated, in_and_out, teacher_forced
from mlx_resonance.posgen.report import PAPER, accuracy_curves, paired_bootstrap, summarize
from mlx_resonance.posgen.settings import ENCODINGS, OFFICIAL_SEEDS, PRESETS, settings_from, sweep_seeds
from mlx_resonance.posgen.sweep import header, read_results, run_sweep
from mlx_resonance.posgen.tasks import SUBTASKS, Task
from mlx_resonance.posgen.train import Best, Run, results, run_training

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

SMOKE = PRESETS["smoke"]
TASK = Task("recursive")
VARIES = {"seconds"}


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_presets_are_what_the_sources_say() -> None:
    official, paper = PRESETS["official"], PRESETS["paper"]
    assert (official.model.layers, paper.model.layers) == (6, 2)
    assert (official.model.train_feed_forward, paper.model.train_feed_forward) == (False, True)
    assert (official.split, paper.split) == ("official", "disjoint")
    assert (official.train_scaled, paper.train_scaled) == (False, True)
    for preset in (official, paper):
        assert preset.steps == 11850 and preset.factor == 257 / 65
        assert preset.frequencies("yarn", True).attention_scale == pytest.approx(1.1375, abs=5e-5)
    assert official.original_max_position_embeddings == 257
    for preset in PRESETS.values():
        assert settings_from(json.loads(json.dumps(preset.to_dict()))) == preset


def test_encodings() -> None:
    official = PRESETS["official"]
    for encoding in ENCODINGS:
        resonant = encoding.startswith("resonance_")
        assert official.frequencies(encoding, True).is_resonant == resonant
        unscaled = official.frequencies(encoding, False)
        plain = frequencies.default_frequencies(64, 10000.0)
        assert unscaled == (plain.resonate() if resonant else plain)
        assert official.training_encoding(encoding) == ("resonance_rope" if resonant else "rope")
        assert PRESETS["paper"].training_encoding(encoding) == encoding
    yarn = frequencies.yarn_frequencies(64, 10000.0, 257 / 65, 257, beta_fast=2, beta_slow=1)
    assert official.frequencies("yarn", True) == yarn
    assert official.frequencies("resonance_yarn", True) == yarn.resonate()


def test_a_run_that_was_killed_ends_bit_identical(tmp_path) -> None:
    run = Run(TASK, SMOKE, ("rope", "yarn"), (3, 5))
    model, best = run_training(run)
    path = tmp_path / "checkpoint.safetensors"

    def kill(step: int, *_) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(run, path, kill)
    steps = []
    resumed, resumed_best = run_training(run, path, lambda step, *_: steps.append(step))
    assert steps == [5, 6]
    assert_same(arrays(model.parameters()), arrays(resumed.parameters()))
    assert_same(arrays(best.arrays), arrays(resumed_best.arrays))


def test_seeds_side_by_side_are_the_seeds_alone() -> None:
    """Dropout, order of rows and initial values depend on a decoder's own seed; float32 sums may differ in order."""
    both, both_best = run_training(Run(TASK, SMOKE, ("yarn",), (3, 5)))
    for i, seed in enumerate((3, 5)):
        alone, best = run_training(Run(TASK, SMOKE, ("yarn",), (seed,)))
        for name, value in arrays(alone.parameters()).items():
            np.testing.assert_allclose(value[0], arrays(both.parameters())[name][i], atol=2e-5, err_msg=name)
        assert best.arrays["yarn.step"][0] == both_best.arrays["yarn.step"][i]
    other, _ = run_training(Run(TASK, SMOKE, ("yarn",), (4,)))
    assert not np.allclose(arrays(other.parameters())["embedding"], arrays(alone.parameters())["embedding"])


def test_encodings_that_share_a_training_get_what_each_alone_gets() -> None:
    run = Run(TASK, SMOKE, ("rope", "ntk"), (1,))
    _, shared = run_training(run)
    for encoding in run.encodings:
        _, alone = run_training(replace(run, encodings=(encoding,)))
        assert_same({name: value for name, value in arrays(shared.arrays).items() if name.startswith(encoding)},
                    arrays(alone.arrays))  # fmt: skip
    with pytest.raises(ValueError, match="different angles"):
        Run(TASK, SMOKE, ("rope", "resonance_rope"), (1,))


def test_scaled_training_differs() -> None:
    plain, _ = run_training(Run(TASK, SMOKE, ("ntk",), (1,)))
    scaled, _ = run_training(Run(TASK, replace(SMOKE, train_scaled=True), ("ntk",), (1,)))
    assert not np.array_equal(arrays(plain.parameters())["embedding"], arrays(scaled.parameters())["embedding"])


def test_the_best_weights_are_the_earliest_of_the_best() -> None:
    run = Run(TASK, SMOKE, ("rope",), (1, 2))
    model = run.model()
    best = Best(run, model)
    for step, accuracy in ((1, (0.1, 0.5)), (2, (0.3, 0.5)), (3, (0.3, 0.4))):
        model.update({"embedding": mx.full(model.embedding.shape, step)})
        best.consider("rope", step, np.array(accuracy), model)
    assert best.arrays["rope.step"].tolist() == [2, 1]
    best.load_into(model, "rope")
    assert model.embedding[:, 0, 0].tolist() == [2, 1]


def test_the_model_learns_and_the_measures_see_it() -> None:
    """A rule of one token: a small model gets it right in and, the rule being local, mostly out of distribution."""
    task = Task("recursive", modulus=5, near=1, far=0, arithmetic="pow_sin")
    settings = replace(SMOKE, split="official", epochs=40, learning_rate=2e-2, model=replace(SMOKE.model, dropout=0.0))
    run = Run(task, settings, ("rope",), (1,))
    losses = []
    model, best = run_training(run, on_progress=lambda step, loss, *_: losses.append(loss))
    assert losses[-1] < 0.05 < 1 < losses[0]
    line = results(run, model, best)[0]
    assert line["id"] == line["generated_id"] == 1.0
    assert line["correct"][: settings.train_length - 1] == [line["rows"]] * (settings.train_length - 1)


def test_measures_count_positions() -> None:
    run = Run(TASK, SMOKE, ("rope",), (1, 2))
    model, rope, rows = run.model(), run.rope("rope", True), run.splits().test
    counts = teacher_forced(model, rope, rows, TASK)
    assert counts.shape == (2, SMOKE.test_length - TASK.seed_length)
    assert counts.max() <= len(rows)
    assert generated(model, rope, rows, TASK, 12).shape == (2, 12)
    # The first generated token is the one that teacher forcing predicts there.
    np.testing.assert_array_equal(generated(model, rope, rows, TASK, 4)[:, 0], counts[:, 0])
    inside, outside = in_and_out(np.array([[4, 2, 0, 0, 1]]), 4, 2)
    assert (inside.tolist(), outside.tolist()) == ([0.75], [1 / 12])


# --- sweep -----------------------------------------------------------------------------------------------------------


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


def test_a_sweep_does_what_is_missing(swept, tmp_path) -> None:
    output, lines = swept
    text = output.read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    kept = [line for line in text if '"semi-recursive", "encoding": "ntk"' not in line]
    part.write_text("".join(kept) + text[-1][:50])  # and a line that a killed run did not finish
    runs = []
    again = run_sweep(part, "smoke", SMOKE, TASK, seeds=(1, 2), on_run=lambda run, *_: runs.append(run))
    assert [(run.task.subtask, run.encodings, run.seeds) for run in runs] == [
        ("semi-recursive", ("ntk",), (1,)), ("semi-recursive", ("ntk",), (2,)),
    ]  # fmt: skip
    assert without(again) == without(lines)


def test_a_sweep_of_other_settings_is_refused(swept) -> None:
    output, _ = swept
    before = output.read_bytes()
    for settings, task, name in (
        (replace(SMOKE, epochs=3), TASK, "epochs is 2 there, 3 now"),
        (replace(SMOKE, train_scaled=True), TASK, "train_scaled is False there, True now"),
        (replace(SMOKE, model=replace(SMOKE.model, layers=2)), TASK, "layers is 1 there, 2 now"),
        (SMOKE, replace(TASK, modulus=16), "modulus is 17 there, 16 now"),
    ):
        with pytest.raises(ValueError, match=name):
            run_sweep(output, "smoke", settings, task, seeds=(1,))
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
        process = subprocess.Popen([sys.executable, "-c", code, str(output)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if output.exists() and output.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 20 <= output.read_bytes().count(b"\n") < 49
    assert without(run_sweep(output, "smoke", SMOKE, TASK, seeds=(1, 2))) == without(lines)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_seeds_of_a_sweep() -> None:
    assert sweep_seeds(5) == OFFICIAL_SEEDS and sweep_seeds(2) == OFFICIAL_SEEDS[:2]
    assert sweep_seeds(7) == (*OFFICIAL_SEEDS, 1, 2)


# --- report ----------------------------------------------------------------------------------------------------------


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
    """Of many experiments whose true difference is 1, about 95 % of the intervals hold it (fewer with few seeds)."""
    random = np.random.default_rng(11)
    held = 0
    for _ in range(400):
        interval = paired_bootstrap(random.normal(1, 2, size=30))
        held += interval["low"] <= 1 <= interval["high"]
    assert 356 <= held <= 388  # 89 % to 97 %
    assert paired_bootstrap(np.array([0.5]))["low"] is None


def test_figure(swept, tmp_path) -> None:
    _, lines = swept
    curves = accuracy_curves(lines)
    assert list(curves) == list(SUBTASKS) and list(curves["cot"]) == list(ENCODINGS)
    assert curves["cot"]["rope"].shape == (SMOKE.test_length - 4,)
    plot_posgen(curves, 4, SMOKE.train_length, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("resonance_yarn") >= 1


# --- commands --------------------------------------------------------------------------------------------------------


def test_data_command(run, tmp_path) -> None:
    output = tmp_path / "table.npy"
    arguments = "--arithmetic pow_sin --modulus 17 --near 3 --far 1 --rows 12000 --length 512".split()
    assert run("posgen", "data", "--subtask", "semi_recursive", *arguments, "--output", output)[0] == 0
    table = np.load(output)
    assert table.dtype == np.int32 and table.shape == (12000, 512)
    assert [path.name for path in tmp_path.iterdir()] == ["table.npy"]


def test_train_and_eval_commands(run, tmp_path) -> None:
    folder = str(tmp_path / "run")
    arguments = ("--subtask", "recursive", "--encoding", "resonance_yarn", "--preset", "smoke", "--output", folder)
    first = run("posgen", "train", *arguments)
    assert first[0] == 0 and "The paper has 98.3" in first[1]
    assert sorted(os.listdir(folder)) == ["model.safetensors", "run.json"]
    again = json.loads(run("posgen", "train", *arguments, "--json")[1])
    same = json.loads(run("posgen", "eval", folder, "--json")[1])
    for name in ("id", "ood", "correct", "generated", "continued", "step"):
        assert same[name] == again[name]
    longer = json.loads(run("posgen", "eval", folder, "--length", "40", "--encoding", "ntk", "--json")[1])
    assert len(longer["correct"]) == 36 and longer["settings"]["test_length"] == 40
    assert run("posgen", "eval", folder)[0] == 0


def test_train_command_goes_on(run, tmp_path, monkeypatch) -> None:
    arguments = ("--subtask", "cot", "--encoding", "yarn", "--preset", "smoke", "--json", "--output")
    whole = json.loads(run("posgen", "train", *arguments, str(tmp_path / "whole"))[1])
    from mlx_resonance.posgen import runs

    with monkeypatch.context() as patch:
        patch.setattr(runs, "results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("posgen", "train", *arguments, str(tmp_path / "part"))[0] == 130
    assert run("posgen", "eval", str(tmp_path / "part"))[0] == 2  # not finished
    assert "checkpoint.safetensors" in os.listdir(tmp_path / "part")
    part = json.loads(run("posgen", "train", *arguments, str(tmp_path / "part"))[1])
    assert {**part, "output": ""} == {**whole, "output": ""}
    assert (tmp_path / "part/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_sweep_and_report_commands(run, tmp_path) -> None:
    output = str(tmp_path / "posgen-smoke.jsonl")
    sweep = json.loads(run("posgen", "sweep", "--preset", "smoke", "--seeds", "2", "--output", output, "--json")[1])
    assert sweep["results"] == 48
    shown = run("posgen", "report", output, "--plot", str(tmp_path / "figure.png"))
    assert shown[0] == 0 and "48.46" in shown[1] and (tmp_path / "figure.png").stat().st_size > 10_000
    assert all(len(line) <= 80 for line in shown[1].splitlines())
    report = json.loads(run("posgen", "report", output, "--json")[1])
    assert report["settings"]["split"] == "disjoint" and report["table"] == sweep["table"]


BAD = {
    "data --subtask cot --modulus 1 --output {}/x.npy": "modulus must be at least 2",
    "data --subtask cot --near 9 --far 9 --output {}/x.npy": "at most the modulus 17",
    "data --subtask cot --length 3 --output {}/x.npy": "length must be at least near + far = 4",
    "data --subtask nested --output {}/x.npy": "subtask must be one of recursive, cot, semi-recursive, got 'nested'",
    "data --subtask cot --arithmetic sum --output {}/x.npy": "arithmetic must be one of",
    "data --subtask cot --output {}/x.txt": "suffix must be .npy",
    "data --subtask cot --output {}/none/x.npy": "no folder",
    "data --subtask cot --rows 1000000000000 --output {}/x.npy": "at most 2**31",
    "data --subtask cot --split random --output {}/x.npy": "split must be one of",
    "train --subtask cot --encoding alibi --output {}/r": "encoding must be one of rope, linear, ntk, yarn",
    "train --subtask cot --encoding rope --preset huge --output {}/r": "preset must be one of",
    "train --subtask cot --encoding rope --preset smoke --epochs 0 --output {}/r": "epochs must be at least 1",
    "train --subtask cot --encoding rope --preset smoke --seed -1 --output {}/r": "seed must lie in",
    "train --subtask cot --encoding rope --preset smoke --near 11 --output {}/r": "need near + far = 12 < train_length",
    "train --subtask cot --encoding rope --preset smoke --output {}": "has no run.json",
    "sweep --preset smoke --seeds 0 --output {}/s.jsonl": "--seeds must be at least 1",
    "sweep --preset smoke --together 0 --output {}/s.jsonl": "--together must be at least 1",
    "sweep --preset smoke --encoding alibi --output {}/s.jsonl": "encoding must be one of",
    "sweep --preset smoke --subtask nested --output {}/s.jsonl": "subtask must be one of",
    "sweep --preset smoke --modulus 3 --near 2 --output {}/s.jsonl": "as many different seeds",
    "sweep --preset smoke --output {}/notes.txt": "no file of posgen results",
    "report {}/none.jsonl": "none.jsonl",
    "report {}/notes.txt": "no file of posgen results",
    "eval {}/none": "none",
    "eval {}": "run.json",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(run, tmp_path, command) -> None:
    (tmp_path / "notes.txt").write_text("buy milk\n")
    code, out, err = run("posgen", *command.format(tmp_path).split())
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and BAD[command] in err
    assert os.listdir(tmp_path) == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "buy milk\n"


def test_every_name_of_a_setting_is_explained() -> None:
    text = posgen_settings.Settings.__doc__
    assert all(name in text for name in posgen_settings.Settings.__dataclass_fields__)
