"""Every command with a run log: a killed run resumes, and results with other settings, models or data are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mlx_resonance.run_log import RunLog

import pytest

from .checkpoints import source

LEVAL = {"input": "A long text. " * 5, "instructions": ["Q1\nA. x", "Q2"], "outputs": ["A", "B"], "evaluation": "exam"}
HARNESS = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [""], max_tokens: 3}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class Case(NamedTuple):
    """A command with a run log.

    Attributes:
        command: its arguments; {model}, {out} and the names of the files of `write_data` are filled in.
        key: the fields that identify a result.
        setting: options that change a setting, and what the refusal must say.
        data: a file of `write_data` that is changed, and what the refusal must say; None if there is no data.
        log: where the run log is while the run is in progress.
        one_model: whether all results in a file belong to one model.
    """

    command: str
    key: tuple[str, ...]
    setting: tuple[str, str]
    data: tuple[str, str] | None = None
    log: str = "{out}"
    one_model: bool = True


CASES = {
    "generate": Case(
        "generate -m {model} --prompts-file {prompts} --output {out} --max-tokens 4",
        ("id",), ("--temp 0.7", "temp is 0.0 there and 0.7 here"),
        ("prompts", 'prompt is "def f" there and "def g" here'),
    ),
    "perplexity": Case(
        "eval perplexity -m {model} --data {text} --contexts 64,128 --stride 48 --output {out}",
        ("digest", "context", "document"), ("--stride 32", "stride is 48 there and 32 here"),
        ("text", "data is "), one_model=False,
    ),
    "passkey": Case(
        "eval passkey -m {model} --lengths 300,310 --depths 0,100 --repetitions 1 --output {out}",
        ("length", "depth", "repetition"), ("--seed 5", "seed is 0 there and 5 here"),
    ),
    "leval": Case(
        "eval leval -m {model} --data {leval} --output {out} --max-tokens 3",
        ("task", "id"), ("--max-tokens 4", "max_tokens is 3 there and 4 here"), ("leval", "digest is "),
    ),
    "harness": Case(
        "eval harness -m {model} --tasks tiny --include-path {tasks} --output {out}",
        ("request", "digest"), ("--max-tokens 2", "max_tokens is null there and 2 here"),
    ),
    "sweep": Case(
        "posgen sweep --preset smoke --seeds 2 --subtask cot --encoding rope --encoding resonance_rope --output {out}",
        ("subtask", "encoding", "seed"), ("--epochs 3", "epochs is 2 there and 3 here"),
    ),
    "train": Case(
        "posgen train --preset smoke --subtask cot --encoding rope --output {out}",
        ("subtask", "encoding", "seed"), ("--epochs 3", "epochs is 2 there and 3 here"), log="{out}/run.jsonl",
    ),
    "finetune": Case(
        "finetune -m {model} --data {text} --mlx-path {out} --length 64 --steps 4 --accumulate 1 --checkpoint-every 1",
        ("step",), ("--learning-rate 0.001", "learning_rate is 2e-05 there and 0.001 here"),
        ("text", "sequences is "), log="{out}.partial/finetune.jsonl",
    ),
}  # fmt: skip
WITH_MODEL = [name for name, case in CASES.items() if "{model}" in case.command and case.one_model]


def write_data(folder: Path) -> dict[str, Path]:
    """Small data of every kind. Returns where it is."""
    folder.mkdir()
    (folder / "text.txt").write_text(source()[:3000])
    prompts = [{"id": i, "prompt": f"def {letter}"} for i, letter in enumerate("fghi")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "coursera.jsonl").write_text(json.dumps(LEVAL) + "\n")
    (folder / "tasks").mkdir()
    documents = [{"question": "import", "answer": " os"}, {"question": "def", "answer": " main"}]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = HARNESS.format(data=folder / "documents.jsonl", cache=folder / "cache")
    (folder / "tasks" / "tiny.yaml").write_text(task)
    names = {"text": "text.txt", "prompts": "prompts.jsonl", "leval": "coursera.jsonl"}
    return {name: folder / file for name, file in (names | {"tasks": "tasks"}).items()}


class Runner:
    """Runs a case's command in this process, on the same data and model, into any output."""

    def __init__(self, name: str, run: Any, model: Path, folder: Path) -> None:
        self.case, self.run, self.model, self.places = CASES[name], run, model, write_data(folder / "data")

    def __call__(self, out: Path, more: str = "", model: Path | str | None = None) -> tuple[int, str, str]:
        places = {"model": model or self.model, "out": out, **self.places}
        given = dict(zip(more.split()[::2], more.split()[1::2], strict=True))
        parts = self.case.command.split()
        for flag, value in given.items():  # instead of the case's own value
            if flag in parts:
                parts[parts.index(flag) + 1] = value
            else:
                parts += [flag, value]
        return self.run(*(part.format(**places) for part in parts))

    def log(self, out: Path) -> Path:
        """The run log while the run is in progress."""
        return Path(self.case.log.format(out=out))

    def results(self, path: Path) -> dict[tuple[Any, ...], Any]:
        """The results in a run log, without the time they took."""
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        lines = [line for line in lines if line.get("request") != "result"]  # the harness's summary has times in it
        keyed = {tuple(line.get(name) for name in self.case.key): line for line in lines}
        return {
            key: {k: v for k, v in line.items() if k != "seconds"} for key, line in keyed.items() if "result" not in key
        }


@pytest.fixture
def runner(checkpoint: Path, tmp_path: Path, run: Any) -> Callable[[str], Runner]:
    return lambda name: Runner(name, run, checkpoint, tmp_path)


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> pytest.MonkeyPatch:
    """End the run within the `count`-th addition to its log, which leaves half a line."""
    append, left = RunLog.append, [count]

    def killed(self: RunLog, *records: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            with self.path.open("ab") as file:
                file.write(json.dumps(records[0]).encode()[:20])
            raise KeyboardInterrupt
        append(self, *records)

    monkeypatch.setattr(RunLog, "append", killed)
    return monkeypatch


def finished_log(runner: Runner, out: Path) -> Path:
    """The run log of a run that has ended."""
    return out / "finetune.jsonl" if runner.case.log.endswith("finetune.jsonl") else runner.log(out)


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_resumes(
    name: str, runner: Callable[[str], Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = runner(name)
    whole, out = tmp_path / "whole", tmp_path / "out"
    code, _, err = command(whole)
    assert code == 0, err
    expected = command.results(finished_log(command, whole))
    kills = 1 if len(expected) == 1 else 2
    with monkeypatch.context() as patch:
        kill_at(patch, kills)
        assert command(out)[0] == 130
    before = command.log(out).read_bytes()
    assert before.count(b"\n") == kills and not before.endswith(b"\n")  # the header, and a result if there are several
    code, _, err = command(out)
    assert code == 0, err
    log = finished_log(command, out)
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1])  # nothing was repeated
    assert command.results(log) == expected
    assert len(log.read_bytes().splitlines()) == len(finished_log(command, whole).read_bytes().splitlines())


def begun(command: Runner, out: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A run that was killed after its first result, or the whole run if it has one only. Returns what its log holds."""
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        assert command(out)[0] in (0, 130)
    before = command.log(out).read_bytes()
    assert before.count(b"\n") == 2
    return before


def check_refused(command: Runner, out: Path, before: bytes, ended: tuple[int, str, str], message: str) -> None:
    code, stdout, stderr = ended
    assert (code, stdout) == (2, ""), stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and ": give another --" in errors[0], stderr
    assert command.log(out).read_bytes() == before


@pytest.mark.parametrize("name", CASES)
def test_another_setting_is_refused_with_both_values(
    name: str, runner: Callable[[str], Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = runner(name), tmp_path / "out"
    before = begun(command, out, monkeypatch)
    options, message = command.case.setting
    check_refused(command, out, before, command(out, options), message)


@pytest.mark.parametrize("name", CASES)
def test_a_run_without_results_binds_nobody(
    name: str, runner: Callable[[str], Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = runner(name), tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        assert command(out)[0] == 130
    before, (options, message) = command.log(out).read_bytes(), command.case.setting
    if name == "train":  # its checkpoint is beside the log, and was trained
        check_refused(command, out, before, command(out, options), message)
        check_refused(command, out, before, command(out, "--seed 7"), "seed is 42 there and 7 here")
        (out / "checkpoint.safetensors").unlink()
    code, _, err = command(out, options)
    assert code == 0, err
    assert command.results(finished_log(command, out))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.data])
def test_other_data_are_refused_with_both_values(name: str, runner: Callable[[str], Runner], tmp_path: Path) -> None:
    command, out = runner(name), tmp_path / "out"
    assert command.case.data is not None
    data, message = command.case.data
    if name == "finetune":  # its log is deleted with the run
        with pytest.MonkeyPatch.context() as patch:
            begun(command, out, patch)
    else:
        assert command(out)[0] == 0
    before = command.log(out).read_bytes()
    text = command.places[data].read_text()
    changes = {
        "generate": ("def f", "def g"),
        "leval": ("A long text", "A text"),
    }
    command.places[data].write_text(text.replace(*changes.get(name, ("e", "a"))))
    check_refused(command, out, before, command(out), message)


@pytest.mark.parametrize("name", WITH_MODEL)
def test_another_model_is_refused_and_a_copy_is_not(
    name: str, runner: Callable[[str], Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = runner(name), tmp_path / "out"
    before = begun(command, out, monkeypatch)
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(command.model, copy)
    shutil.copytree(command.model, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[len(content) // 2 + 4321] ^= 1  # one bit of one weight
    (other / "model.safetensors").write_bytes(content)
    check_refused(command, out, before, command(out, model=other), "digest is ")
    os.utime(copy / "model.safetensors", (1, 1))
    code, _, err = command(out, model=os.path.relpath(copy))
    assert code == 0, err


@pytest.mark.parametrize("name", [name for name in WITH_MODEL if name != "finetune"])
def test_another_rope_is_refused(
    name: str, runner: Callable[[str], Runner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = runner(name), tmp_path / "out"
    before = begun(command, out, monkeypatch)
    check_refused(command, out, before, command(out, "--factor 4"), "here")


def test_perplexity_keeps_models_apart(runner: Callable[[str], Runner], tmp_path: Path) -> None:
    """One file may hold several models and ropes: each line has its own digest."""
    command, out = runner("perplexity"), tmp_path / "out"
    other = tmp_path / "other"
    shutil.copytree(command.model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2 + 4321] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert command(out)[0] == 0
    first = command.results(out)
    for ended in (command(out, model=other), command(out, "--factor 4")):
        assert ended[0] == 0, ended[2]
    assert len(command.results(out)) == 3 * len(first) and first.items() <= command.results(out).items()
