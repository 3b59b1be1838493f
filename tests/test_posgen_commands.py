"""PosGen's commands, on the preset that takes a second: what they write, refuse, and leave behind after a fault."""

import json
import math
import os
import resource
from pathlib import Path

from mlx_resonance.cli import posgen
from mlx_resonance.cli.output import count_bar
from mlx_resonance.posgen import runs
from mlx_resonance.posgen.settings import PRESETS

import mlx.core as mx
import numpy as np
import pytest
from rich.progress import TimeRemainingColumn

from .posgen_plain import sha256

GOLDEN = Path(__file__).parent / "data" / "posgen.json"
TRAIN = ("posgen", "train", "--subtask", "cot", "--encoding", "yarn", "--preset", "smoke", "--json", "--output")


def test_data_command(run, tmp_path) -> None:
    output = tmp_path / "table.npy"
    arguments = "--arithmetic pow_sin --modulus 17 --near 3 --far 1 --rows 12000 --length 512".split()
    assert run("posgen", "data", "--subtask", "semi_recursive", *arguments, "--output", output)[0] == 0
    table = np.load(output)
    assert table.dtype == np.int32 and table.shape == (12000, 512)
    assert [path.name for path in tmp_path.iterdir()] == ["table.npy"]
    assert sha256(table) == next(
        golden["sha256_int32"] for golden in json.loads(GOLDEN.read_text())
        if (golden["subtask"], golden["arithmetic"], golden["modulus"]) == ("semirecurrent", "pow_sin", 17)
    )  # fmt: skip


def test_train_and_eval_commands(run, tmp_path) -> None:
    folder = str(tmp_path / "run")
    arguments = ("--subtask", "recursive", "--encoding", "resonance_yarn", "--preset", "smoke", "--output", folder)
    first = run("posgen", "train", *arguments)
    assert first[0] == 0 and "The paper reports" not in first[1]  # nothing of 12 digits
    assert sorted(os.listdir(folder)) == ["model.safetensors", "run.jsonl"]
    again = json.loads(run("posgen", "train", *arguments, "--json")[1])
    same = json.loads(run("posgen", "eval", folder, "--json")[1])
    for name in ("id", "ood", "correct", "generated", "continued", "step"):
        assert same[name] == again[name]
    longer = json.loads(run("posgen", "eval", folder, "--length", "40", "--encoding", "ntk", "--json")[1])
    assert len(longer["correct"]) == 36 and longer["settings"]["test_length"] == 40
    assert run("posgen", "eval", folder)[0] == 0


def test_train_command_resumes(run, tmp_path, monkeypatch) -> None:
    whole = json.loads(run(*TRAIN, tmp_path / "whole")[1])
    with monkeypatch.context() as patch:
        patch.setattr(runs, "results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*TRAIN, tmp_path / "part")[0] == 130
    code, _, err = run("posgen", "eval", str(tmp_path / "part"))
    assert code == 2 and "part has no finished run" in err
    assert "checkpoint.safetensors" in os.listdir(tmp_path / "part")
    found, train = [], runs.run_training

    def noted(run, path, *rest):
        found.append(path.exists())
        return train(run, path, *rest)

    monkeypatch.setattr(runs, "run_training", noted)
    part = json.loads(run(*TRAIN, tmp_path / "part")[1])
    assert found == [True]  # it resumes from the checkpoint
    assert {**part, "output": ""} == {**whole, "output": ""}
    assert (tmp_path / "part/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_sweep_and_report_commands(run, tmp_path) -> None:
    output = str(tmp_path / "posgen-smoke.jsonl")
    sweep = json.loads(run("posgen", "sweep", "--preset", "smoke", "--seeds", "1", "--output", output, "--json")[1])
    assert sweep["results"] == 24
    shown = run("posgen", "report", output, "--plot", str(tmp_path / "figure.png"))
    assert shown[0] == 0 and "48.5" not in shown[1] and (tmp_path / "figure.png").stat().st_size > 10_000
    assert all(len(line) <= 80 for line in shown[1].splitlines())
    report = json.loads(run("posgen", "report", output, "--json")[1])
    assert report["settings"]["split"] == "disjoint" and report["table"] == sweep["table"]


def test_the_report_shows_either_weights(run, tmp_path) -> None:
    output = tmp_path / "smoke.jsonl"
    sweep = ("sweep", "--preset", "smoke", "--seeds", "1", "--subtask", "cot", "--encoding", "rope", "--output", output)
    assert run("posgen", *sweep)[0] == 0
    line = json.loads(output.read_text().splitlines()[1])
    for weights, chosen in (("best", line), ("last", line["last"])):
        found = json.loads(run("posgen", "report", output, "--weights", weights, "--json")[1])
        row = found["table"]["cot"]["rope"]
        assert found["weights"] == weights and row["ood"] == pytest.approx(100 * chosen["ood"])
        assert row["trained_id"] == pytest.approx(100 * sum(chosen["trained"][1:]) / 7 / line["rows"], abs=1e-3)
        shown = run("posgen", "report", output, "--weights", weights)[1]
        assert f"{weights} weights" in shown and f"{row['trained_id']:.1f}*" in shown  # below the bar
        assert (row["generated_ood"] is None) == (weights == "last")  # which wrote no text
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    del lines[1]["last"]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run("posgen", "report", output, "--weights", "last")
    assert code == 2 and "have only the best weights" in err and "--weights" in err


def test_what_was_measured_with_the_trained_angles_stays(run, tmp_path) -> None:
    """Read with other ones, or at another length, the weights were still trained with the first ones."""
    assert run(*TRAIN, tmp_path / "r", "--train-scaled")[0] == 0
    trained = json.loads((tmp_path / "r" / "run.jsonl").read_text().splitlines()[1])
    for other in (("--encoding", "resonance_ntk"), ("--length", "40")):
        found = json.loads(run("posgen", "eval", tmp_path / "r", *other, "--json")[1])
        assert all(found[name] == trained[name] for name in ("first", "trained_id", "trained"))
        assert (found["encoding"], len(found["correct"])) != (trained["encoding"], len(trained["correct"]))


def test_every_result_says_its_split(run, tmp_path, monkeypatch) -> None:
    """On the screen and in JSON, in the run's file and in the sweep's."""
    monkeypatch.chdir(tmp_path)
    task, small = ("--subtask", "cot", "--preset", "smoke"), ("--split", "official", "--modulus", "7")
    commands = (
        ("data", "--subtask", "cot", "--rows", "3", "--output", "x.npy", "--split", "official"),
        ("train", *task, *small, "--encoding", "rope", "--output", "r"),
        ("eval", "r"),
        ("sweep", *task, *small, "--encoding", "rope", "--seeds", "1", "--output", "s.jsonl"),
        ("report", "s.jsonl"),
    )
    for command in commands:
        shown, found = run("posgen", *command), run("posgen", *command, "--json")
        assert shown[0] == found[0] == 0, command
        assert "official split" in shown[1] and json.loads(found[1])["split"] == "official", command
    for name in ("r/run.jsonl", "s.jsonl"):
        assert json.loads((tmp_path / name).read_text().splitlines()[0])["settings"]["split"] == "official"


def test_the_bar_shows_loss_accuracies_and_steps() -> None:
    bar = count_bar()
    for _ in range(2):  # two runs leave one row
        show = posgen._progress(bar, "yarn", PRESETS["smoke"])
    (row,) = bar.tasks
    assert (row.description, row.completed, row.total) == ("compiling", 0, 6)
    show(1, 2.5, math.nan, math.nan)
    assert (row.description, row.completed) == ("loss 2.500", 1)
    show(2, 1.25, 0.875, 0.5)
    assert (row.description, row.completed) == ("loss 1.250, yarn: in 87.5 %, out 50.0 %", 2)
    assert any(isinstance(column, TimeRemainingColumn) for column in bar.columns)


# --- faults


def test_a_table_that_does_not_fit_on_the_disk_is_gone(run, tmp_path) -> None:
    (tmp_path / "old.npy").write_bytes(b"as before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores the signal
    try:
        code, out, err = run("posgen", "data", "--subtask", "cot", "--rows", "100", "--output", tmp_path / "old.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert os.listdir(tmp_path) == ["old.npy"] and (tmp_path / "old.npy").read_bytes() == b"as before"


def test_weights_that_do_not_fit_on_the_disk(run, tmp_path, monkeypatch) -> None:
    whole = run(*TRAIN, tmp_path / "whole")[1]

    def full(path: str, *_) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 647 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "results", lambda *_: patch.setattr(mx, "save_safetensors", full) or [{}])
        code, out, err = run(*TRAIN, tmp_path / "r")
    assert (code, out) == (1, "") and "model.safetensors cannot be written" in err.splitlines()[-1]
    assert sorted(os.listdir(tmp_path / "r")) == ["checkpoint.safetensors", "run.jsonl"]
    again = json.loads(run(*TRAIN, tmp_path / "r")[1])
    assert {**again, "output": ""} == {**json.loads(whole), "output": ""}
    assert sorted(os.listdir(tmp_path / "r")) == ["model.safetensors", "run.jsonl"]


def test_a_run_that_was_killed_between_two_files(run, tmp_path) -> None:
    """Before its header was written, then before its checkpoint was deleted."""
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "run.jsonl").write_text('{"posgen": 1, "pre')
    assert run(*TRAIN, folder)[0] == 0
    assert sorted(os.listdir(folder)) == ["model.safetensors", "run.jsonl"]
    (folder / "checkpoint.safetensors").touch()
    assert run(*TRAIN, folder)[0] == 0
    assert sorted(os.listdir(folder)) == ["model.safetensors", "run.jsonl"]


def test_a_broken_run_is_refused(run, tmp_path) -> None:
    folder = tmp_path / "r"
    assert run(*TRAIN, folder)[0] == 0
    log, weights = (folder / "run.jsonl").read_text(), (folder / "model.safetensors").read_bytes()
    header, result = map(json.loads, log.splitlines())
    for line, change, wrong in (
        (0, {"task": {}, "settings": {}}, "does not say the settings"),
        (1, {"subtask": 3}, "line 2 has no 'subtask' that is a string (DIR)"),
        (1, {"seed": None}, "line 2 has no 'seed' that is an integer (DIR)"),
        (1, {"validation_id": 2.0}, "line 2: validation_id cannot be 2.0 (DIR)"),
    ):
        lines = [header, result]
        lines[line] = lines[line] | change
        (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, out, err = run("posgen", "eval", folder)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and wrong in err, err
    (folder / "run.jsonl").write_text(log)
    for length, wrong in (("12", "must be more than the training length 12"), ("8193", "8192")):
        code, out, err = run("posgen", "eval", folder, "--length", length)
        assert (code, out) == (2, "") and wrong in err
    (folder / "model.safetensors").write_bytes(weights[:-1])
    code, out, err = run("posgen", "eval", folder)
    assert (code, out) == (2, "") and "is not a complete safetensors file" in err
    (folder / "model.safetensors").unlink()
    assert run("posgen", "eval", folder)[0] == 2


def test_another_run_in_the_folder_is_refused(run, tmp_path) -> None:
    arguments = "posgen train --subtask cot --encoding yarn --preset smoke --output".split()
    assert run(*arguments, tmp_path / "r")[0] == 0
    before = (tmp_path / "r/run.jsonl").read_bytes()
    for change, wrong in (
        ("--seed 1", "seed is 42 there and 1 here"),
        ("--encoding rope", 'encoding is "yarn" there and "rope" here'),
        ("--subtask recursive", 'subtask is "cot" there and "recursive" here'),
        ("--epochs 3", "epochs is 2 there and 3 here"),
        ("--preset laptop", 'preset is "smoke" there and "laptop" here'),
    ):
        code, out, err = run(*arguments, tmp_path / "r", *change.split())
        assert (code, out, len(err.splitlines())) == (2, "", 1) and wrong in err, err
        assert err.rstrip().endswith("give another --output")
    assert (tmp_path / "r/run.jsonl").read_bytes() == before


def test_a_run_is_read_as_a_sweep_of_one(run, tmp_path) -> None:
    assert run(*TRAIN, tmp_path / "r")[0] == 0
    found = json.loads(run("posgen", "report", tmp_path / "r/run.jsonl", "--json")[1])
    assert list(found["table"]["cot"]) == ["yarn/13"]


TINY = "--subtask cot --encoding rope --preset smoke"
BAD = {
    "data --subtask cot --modulus 1 --output {}/x.npy": "greater than or equal to 2",
    "data --subtask cot --near 9 --far 9 --output {}/x.npy": "at most the modulus 17, got 9 + 9: give --split disjoint",
    "data --subtask cot --length 3 --output {}/x.npy": "must be at least near + far = 4 tokens, got 3 (--length)",
    "data --subtask nested --output {}/x.npy": "'nested' is not one of recursive, cot, semi-recursive",
    "data --subtask cot --arithmetic sum --output {}/x.npy": "not one of mod_addition, pow_sin, pow_sin_2pi",
    "data --subtask cot --output {}/x.txt": "output must be a name that ends in .npy",
    "data --subtask cot --output {}/none/x.npy": "no folder",
    "data --subtask cot --rows 1000000000000 --output {}/x.npy": "less than or equal to 268435456",
    "data --subtask cot --rows 10000000 --output {}/x.npy": "at most 2**28, got 10000000 times 512 (--rows)",
    "data --subtask cot --split random --output {}/x.npy": "not one of official, disjoint",
    "train --subtask cot --encoding alibi --output {}/r": "not one of rope, linear, ntk, yarn",
    "train --subtask cot --encoding rope --preset huge --output {}/r": "official, official-small, paper, learned",
    f"train {TINY} --epochs 0 --output {{}}/r": "Invalid value for '--epochs'",
    "data --subtask cot --modulus 99999999999999999999 --output {}/x.npy": "less than or equal to 1048576",
    "data --subtask cot --modulus 1000000 --output {}/x.npy": "at most 2**20, got 1000000 times 4 (--modulus)",
    "data --subtask cot --near 99999999999999999999 --split disjoint --output {}/x.npy": "Invalid value for '--near'",
    "data --subtask cot --output {}/folder.npy": "folder.npy is a folder: a file is needed: give another --output",
    "data --subtask cot --far -1 --output {}/x.npy": "greater than or equal to 0",
    "data --subtask cot --rows -5 --output {}/x.npy": "greater than or equal to 1",
    "data --subtask cot --rows nan --output {}/x.npy": "Invalid value for '--rows'",
    f"train {TINY} --epochs 99999999999999999999 --output {{}}/r": "Invalid value for '--epochs'",
    f"train {TINY} --epochs 4194304 --output {{}}/r": "epochs must be at least 1 and at most 1398101",
    f"train {TINY} --seed 4294967296 --output {{}}/r": "less than or equal to 4294967295",
    "sweep --preset smoke --seeds 99999999999999999999 --output {}/s.jsonl": "less than or equal to 1000",
    f"train {TINY} --seed -1 --output {{}}/r": "Invalid value for '--seed'",
    f"train {TINY} --near 11 --output {{}}/r": "near + far must be at most 10",
    f"train {TINY} --output {{}}": "has no run.jsonl: give another --output",
    f"train {TINY} --output {{}}/notes.txt": "notes.txt is a file: expected a folder: give another --output",
    "sweep --preset smoke --seeds 0 --output {}/s.jsonl": "Invalid value for '--seeds'",
    "sweep --preset smoke --encoding alibi --output {}/s.jsonl": "not one of rope, linear",
    "sweep --preset smoke --subtask nested --output {}/s.jsonl": "not one of recursive, cot",
    "sweep --preset smoke --modulus 3 --near 2 --output {}/s.jsonl": "as many different seeds",
    "sweep --preset smoke --output {}/notes.txt": "not a run log of posgen results",
    "sweep --preset smoke --output  ": "the path is empty",
    "report {}/none.jsonl": "none.jsonl: no such file (FILE.jsonl)",
    "report {}/notes.txt": "not a run log of posgen results",
    "eval {}/none": "none/run.jsonl: no such file (DIR)",
    "eval {}": "run.jsonl: no such file (DIR)",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(run, tmp_path, command) -> None:
    (tmp_path / "notes.txt").write_text("buy milk\n")
    (tmp_path / "folder.npy").mkdir()
    code, out, err = run("posgen", *command.format(tmp_path).split(" "))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and BAD[command] in err
    assert (
        sorted(os.listdir(tmp_path)) == ["folder.npy", "notes.txt"]
        and (tmp_path / "notes.txt").read_text() == "buy milk\n"
    )
