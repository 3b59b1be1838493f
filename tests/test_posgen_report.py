"""PosGen's report: what is compared with what, and what a figure may overwrite; a run's weights are its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_resonance.evaluation.passkey import PasskeyGrid
from mlx_resonance.plots import new_figure, reading_looks
from mlx_resonance.posgen.report import paper_of, summarize
from mlx_resonance.posgen.settings import PRESETS
from mlx_resonance.posgen.sweep import read_results
from mlx_resonance.posgen.tasks import Task

import pytest

from .test_posgen_sweep import SMALL, fake

SMOKE = ("posgen", "train", "--subtask", "cot", "--encoding", "rope", "--preset", "smoke", "--output")


@pytest.mark.parametrize(
    ("task", "changes", "paper"),
    [
        ({}, {}, 98.71),
        ({}, {"train_length": 32}, None),
        ({}, {"test_length": 512}, None),
        ({"modulus": 5}, {}, None),
        ({"near": 2}, {}, None),
        ({"far": 2}, {}, None),
        ({"arithmetic": "pow_sin"}, {}, None),
    ],
)
def test_the_papers_numbers_are_for_its_task_alone(
    task: dict[str, Any], changes: dict[str, Any], paper: float | None
) -> None:
    settings = replace(PRESETS["learned"], **changes)
    assert paper_of(Task("cot", **task), settings, "yarn") == paper
    assert paper_of(Task("cot"), settings, "linear") is None


def test_means_over_different_seeds_are_said_to_be(run: Any, tmp_path: Path) -> None:
    more = {"step": 1, "validation_id": 1.0}
    lines = [fake("cot", "rope", seed, 0.5, **more) for seed in (1, 2)] + [
        fake("cot", "resonance_rope", 3, 0.5, **more)
    ]
    lines.append(fake("cot", "rope", 2, 0.25, **more))  # the last line with a key counts
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"posgen": 1} | SMALL, *lines)))
    code, out, err = run("posgen", "report", path)
    assert code == 0 and "cot: the rows are means over different seeds" in out, err
    assert "rope (2)" in out and "resonance_rope (1)" in out
    found, kept = read_results(path)
    assert summarize(found, kept)["same_seeds"] == {"cot": False} and len(kept) == 3
    assert summarize(found, kept)["table"]["cot"]["rope"]["ood"] == pytest.approx(37.5)
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"posgen": 1} | SMALL, *lines[:2])))
    assert "different seeds" not in run("posgen", "report", path)[1]


def test_every_ramp_has_a_look_of_its_own() -> None:
    names = [f"{prefix}yarn/{ramp}" for ramp in (13, 25, 50, 100, 200) for prefix in ("", "resonance_")]
    looks = [json.dumps(look, sort_keys=True) for look in reading_looks(names).values()]
    assert len(set(looks)) == len(names)


def test_a_figure_never_replaces_the_results(run: Any, tmp_path: Path, stdlib_llama: Path) -> None:
    path = tmp_path / "k.png"
    grid = ("eval", "passkey", stdlib_llama, "--lengths", 110, "--depths", 0, "--repetitions", 1)
    code, out, err = run(*grid, "--output", path, "--plot", tmp_path / "." / "k.png")
    assert (code, out) == (2, "") and "k.png is the file of the results, too: give another --plot" in err
    assert not path.exists()
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"posgen": 1} | SMALL,)))
    before = path.read_bytes()
    assert run("posgen", "report", path, "--plot", path)[0] == 2 and path.read_bytes() == before


def test_a_figure_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figure.svg"
    path.write_text("the old one")
    with pytest.raises(OSError, match="full"), new_figure(path, 1, 1) as figure:

        def failing(target: Path) -> None:
            target.write_text("half")
            raise OSError("full")

        monkeypatch.setattr(figure, "savefig", failing)
    assert path.read_text() == "the old one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("grid", [{"lengths": [256, 256], "depths": [0]}, {"lengths": [256], "depths": [0, 0]}])
def test_a_grid_has_every_cell_once(grid: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="each given once"):
        PasskeyGrid(repetitions=1, **grid)


def test_the_weights_are_those_of_the_run(run: Any, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, 1), (other, 2)):
        assert run(*SMOKE, folder, "--seed", seed)[0] == 0
    assert run("posgen", "eval", one)[0] == 0
    weights = (one / "model.safetensors").read_bytes()
    shutil.copy(other / "model.safetensors", one)
    code, out, err = run("posgen", "eval", one)
    assert (code, out) == (2, "") and "model.safetensors is not of the run" in err
    (one / "model.safetensors").unlink()
    code, out, err = run(*SMOKE, one, "--seed", 1)
    assert (code, out) == (2, "") and "but not its model.safetensors: give another --output" in err
    (one / "model.safetensors").write_bytes(weights)
    assert run(*SMOKE, one, "--seed", 1)[0] == 0 and run("posgen", "eval", one)[0] == 0
