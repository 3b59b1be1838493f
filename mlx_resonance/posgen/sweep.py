"""PosGen's sweep: every subtask, encoding and seed, one JSON line each, appended to a file that says its settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ..files import user_path
from ..records import Record, append_records, open_records, read_records
from .settings import ENCODINGS, Settings, settings_from
from .tasks import SUBTASKS, Task
from .train import Progress, Run, results, run_training

KIND = "posgen"
ACCURACIES = ("id", "ood", "generated_id", "generated_ood", "continued_ood")


def header(preset: str, settings: Settings, task: Task) -> Record:
    """The first line of a results file: what all its lines have in common."""
    common = {"arithmetic": task.arithmetic, "modulus": task.modulus, "near": task.near, "far": task.far}
    return {"preset": preset, "task": common, "settings": settings.to_dict()}


def from_header(path: Path, found: Record, subtask: str = SUBTASKS[0]) -> tuple[Settings, Task]:
    """What `header` was made of. Raises ValueError, naming the path, where a part of it is missing or wrong."""
    try:
        if "preset" not in found:
            raise KeyError("preset")
        return settings_from(found["settings"]), Task(subtask, **found["task"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"[posgen] {path} does not say the settings of a run: {error!r}") from None


def read_results(path: Path) -> tuple[Record, list[Record]]:
    """A results file: its header and its lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results file, or a line has something else than a result of its settings.
    """
    found, lines = read_records(path, KIND)
    settings, task = from_header(path, found)
    for number, line in enumerate(lines, 2):
        if wrong := _wrong(line, settings.test_length - task.seed_length):
            value = str(line.get(wrong))[:60]
            raise ValueError(f"[posgen] {path}, line {number}: {wrong} is missing or wrong, {value}")
    return found, lines


def runs_left(
    settings: Settings, task: Task, subtasks: Sequence[str], encodings: Sequence[str], seeds: Sequence[int],
    together: int, done: Sequence[Record],
) -> Iterator[Run]:  # fmt: skip
    """The trainings that a sweep still needs, each with those of its encodings that have no result yet."""
    have = {_key(line) for line in done}
    trainings: dict[str, list[str]] = {}
    for encoding in encodings:
        trainings.setdefault(settings.training_encoding(encoding), []).append(encoding)
    for i in range(0, len(seeds), together):
        for subtask in subtasks:
            for group in trainings.values():
                some = seeds[i : i + together]
                left = [name for name in group if any((subtask, name, seed) not in have for seed in some)]
                if left:
                    missing = [seed for seed in some if any((subtask, name, seed) not in have for name in left)]
                    yield Run(replace(task, subtask=subtask), settings, tuple(left), tuple(missing))


def run_sweep(
    output: Path, preset: str, settings: Settings, task: Task, *,
    subtasks: Sequence[str] = SUBTASKS, encodings: Sequence[str] = ENCODINGS, seeds: Sequence[int],
    together: int | None = None, on_run: Callable[[Run, int, int], Progress | None] | None = None,
) -> list[Record]:  # fmt: skip
    """Train and test what `output` does not have yet, and append it.

    A sweep that was killed goes on where it was: finished trainings are in the file, the one under way has its
    checkpoint beside it. Two sweeps of different subtasks may write one file at the same time.

    Args:
        output: the JSON lines; made if it is not there.
        preset: the name of the settings, for the header.
        settings: what all runs have in common.
        task: the rule; its subtask does not matter.
        subtasks, encodings, seeds: what to run.
        together: seeds that train side by side; None for 1 on a CPU, where more were measured not to be faster
            (benchmarks/posgen_step.py), and for all of them on a GPU.
        on_run: called with a run, its number from 1 and the number of runs; gives what is called at every step.

    Returns:
        All lines of the file.

    Raises:
        ValueError: the file is of other settings, or an argument is wrong.
    """
    if together is None:
        together = 1 if mx.default_device().type == mx.DeviceType.cpu else len(seeds)
    if together < 1:
        raise ValueError(f"[posgen] --together must be at least 1, got {together}")
    subtasks, encodings = list(dict.fromkeys(subtasks)), list(dict.fromkeys(encodings))  # each once
    seeds = list(dict.fromkeys(seeds))
    output = user_path(output)
    for subtask in subtasks:  # refuses what does not fit before the file is made
        Run(replace(task, subtask=subtask), settings, (encodings[0],), tuple(seeds)).splits()
    for encoding in encodings:
        settings.frequencies(encoding, scaled=True)
    open_records(output, KIND, header(preset, settings, task))
    wanted = (settings, task, subtasks, encodings, seeds, together)
    runs = list(runs_left(*wanted, read_results(output)[1]))
    for run in runs_left(*wanted, []):
        if run not in runs:  # a sweep may have been killed when its results were there and its checkpoint still was
            _checkpoint(output, run).unlink(missing_ok=True)
    for number, run in enumerate(runs, 1):
        checkpoint = _checkpoint(output, run)
        started = time.perf_counter()
        model, best = run_training(run, checkpoint, on_run(run, number, len(runs)) if on_run else None)
        where = {
            "seconds": round(time.perf_counter() - started, 1),
            "device": mx.default_device().type.name,
            "mlx": version("mlx"),
        }
        have = {_key(line) for line in read_results(output)[1]}
        append_records(output, [line | where for line in results(run, model, best) if _key(line) not in have])
        checkpoint.unlink(missing_ok=True)
    return read_results(output)[1]


def _key(line: Record) -> tuple[str, str, int]:
    return line["subtask"], line["encoding"], line["seed"]


def _wrong(line: Record, predicted: int) -> str | None:
    """The first field that is not as `results` gives it; `predicted` tokens of a row were to be found."""
    for name, known in (("subtask", SUBTASKS), ("encoding", ENCODINGS)):
        if line.get(name) not in known:
            return name
    for name, least in (("seed", 0), ("rows", 1)):
        if type(line.get(name)) is not int or line[name] < least:
            return name
    for name in ACCURACIES:
        if type(line.get(name)) not in (int, float) or not 0 <= line[name] <= 1:  # NaN neither
            return name
    correct = line.get("correct")
    if not isinstance(correct, list) or len(correct) != predicted:
        return "correct"
    return None if all(type(count) is int and 0 <= count <= line["rows"] for count in correct) else "correct"


def _checkpoint(output: Path, run: Run) -> Path:
    """A name that no other run has: one with other settings must not go on from this one's checkpoint."""
    everything = json.dumps([vars(run.task), run.settings.to_dict(), run.encodings, run.seeds])
    name = f"{run.task.subtask}-{run.encodings[0]}-{hashlib.sha256(everything.encode()).hexdigest()[:12]}"
    return output.with_suffix(f".{name}.safetensors")
