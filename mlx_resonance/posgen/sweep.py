"""PosGen's sweep: every subtask, reading and seed, one line each in a run log."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ..errors import UsageError
from ..run_log import Record, RunLog, check_field, read_run_log
from ..wired import wired
from .settings import ENCODINGS, Reading, Settings, settings_from
from .tasks import SUBTASKS, Task
from .train import Progress, Run, results, run_training

KIND, KEY = "posgen", ("subtask", "encoding", "ramp", "seed")
MEASURED = ("id", "ood", "first", "trained_id")  # accuracies of some weights
ACCURACIES = ("validation_id", "id", "ood", "generated_id", "generated_ood", "continued_ood")
FIELDS = {
    "subtask": str,
    "encoding": str,
    "ramp": int,
    "seed": int,
    "step": int,
    "rows": int,
    **dict.fromkeys(ACCURACIES, float),
}


def header(preset: str, settings: Settings, task: Task) -> Record:
    """What all results of a run log have in common."""
    common = {"arithmetic": task.arithmetic, "modulus": task.modulus, "near": task.near, "far": task.far}
    return {"preset": preset, "task": common, "settings": asdict(settings)}


def from_header(path: Path, found: Record, subtask: str = SUBTASKS[0]) -> tuple[Settings, Task]:
    """The settings and the task of a header. Raises UsageError, naming the path, if a part is missing or wrong."""
    try:
        if "preset" not in found:
            raise KeyError("preset")
        return settings_from(found["settings"]), Task(subtask, **found["task"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{path} does not say the settings of a run: {error!r}") from None


def read_results(path: Path, option: str = "results") -> tuple[Record, list[Record]]:
    """The header and the results of a run log of PosGen, one for each key: the last line with a key counts.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is not a run log of PosGen, or a line is not a result of its settings.
    """
    found, lines = read_run_log(path, KIND, option)
    settings, task = from_header(path, found)
    for number, line in enumerate(lines, 2):
        _check_result(f"{path}, line {number}", line, settings, task, option)
    return found, list({tuple(line[name] for name in KEY): line for line in lines}.values())


def runs_left(
    settings: Settings, task: Task, subtasks: Sequence[str], encodings: Sequence[str], seeds: Sequence[int],
    done: Container[object] = (),
) -> Iterator[Run]:  # fmt: skip
    """The trainings that a sweep still needs, each with those of its readings that have no result yet."""
    trainings: dict[Reading, list[Reading]] = {}
    for reading in settings.readings(encodings):
        trainings.setdefault(settings.training(reading), []).append(reading)
    for seed in seeds:
        for subtask in subtasks:
            for group in trainings.values():
                left = tuple(reading for reading in group if (subtask, *reading, seed) not in done)
                if left:
                    yield Run(replace(task, subtask=subtask), settings, left, seed)


@wired()
def run_sweep(
    output: Path, preset: str, settings: Settings, task: Task, *,
    subtasks: Sequence[str] = SUBTASKS, encodings: Sequence[str] = ENCODINGS, seeds: Sequence[int],
    on_run: Callable[[Run, int, int], Progress | None] | None = None,
) -> list[Record]:  # fmt: skip
    """Train and test what `output` does not have yet, and append it.

    A sweep that was killed resumes: the results of finished trainings are in the file, and the training that was
    running has its checkpoint beside it. Two sweeps of different subtasks may write one file at the same time.

    Args:
        output: the run log; it is made if it does not exist.
        preset: the name of the settings, for the header.
        settings: what all runs have in common.
        task: the rule; its subtask is not used.
        subtasks, encodings, seeds: what to run.
        on_run: called with a run, its number from 1 and the number of runs; returns what to call after every step.

    Returns:
        All results in the file.

    Raises:
        UsageError: the file is of other settings, or an argument is wrong.
    """
    subtasks, encodings = tuple(dict.fromkeys(subtasks)), tuple(dict.fromkeys(encodings))  # each once
    seeds = tuple(dict.fromkeys(seeds))
    everything = list(runs_left(settings, task, subtasks, encodings, seeds))
    for run in {run.task.subtask: run for run in everything}.values():
        run.splits()  # refuse what does not fit before the file is made
    log = RunLog(output, KIND, header(preset, settings, task), key=KEY, fields=FIELDS)
    read_results(output, "output")  # refuse lines that no run gave
    runs = list(runs_left(settings, task, subtasks, encodings, seeds, log))
    for run in everything:
        if run not in runs:  # an earlier sweep may have been killed between its results and the end of its checkpoint
            checkpoint_of(output, run).unlink(missing_ok=True)
    for number, run in enumerate(runs, 1):
        checkpoint = checkpoint_of(output, run)
        started = time.perf_counter()
        model, best = run_training(run, checkpoint, on_run(run, number, len(runs)) if on_run else None)
        where = {
            "seconds": round(time.perf_counter() - started, 1),
            "device": mx.default_device().type.name,
            "mlx": version("mlx"),
        }
        lines = results(run, model, best)
        log.reload()  # another sweep may have added some of them
        log.append(*(line | where for line in lines if tuple(line[name] for name in KEY) not in log))
        checkpoint.unlink(missing_ok=True)
    log.reload()
    return log.records


def _check_result(where: str, line: Record, settings: Settings, task: Task, option: str) -> None:
    """Raise UsageError where a field is not as `results` gives it."""
    for name, wanted in FIELDS.items():
        check_field(where, line, name, wanted, option)
    last, inside = line.get("last", {}), settings.train_length - task.seed_length
    right = {"subtask": line["subtask"] in SUBTASKS, "encoding": line["encoding"] in ENCODINGS}
    right |= {"ramp": (line["ramp"] > 0) == line["encoding"].endswith("yarn"), "seed": 0 <= line["seed"] < 2**32}
    right |= {"rows": line["rows"] >= 1, "correct": "correct" in line, "last": isinstance(last, dict)}
    right |= {name: 0 <= line[name] <= 1 for name in ACCURACIES}  # not NaN
    found = [(name, line.get(name), is_right) for name, is_right in right.items()]
    lengths = {"correct": settings.test_length - task.seed_length, "trained": inside}
    for measured in (line, last) if right["last"] else ():
        for name in (name for name in (*lengths, *MEASURED) if name in measured):
            value = measured[name]
            if name in lengths:
                is_right = isinstance(value, list) and len(value) == lengths[name]
                is_right = is_right and all(type(count) is int and 0 <= count <= line["rows"] for count in value)
            else:
                is_right = type(value) is float and 0 <= value <= 1
            found.append((name, value, is_right))
    for name, value, is_right in found:
        if not is_right:
            raise UsageError(f"{where}: {name} cannot be {value!s:.60}", option=option)


def checkpoint_of(output: Path, run: Run, *more: object) -> Path:
    """A name that no other run has: a run with other settings must not resume from this one's checkpoint.

    Args:
        output: the run log of its results.
        run: the run.
        more: what it depends on besides, for JSON.
    """
    everything = json.dumps([vars(run.task), asdict(run.settings), run.readings, run.seed, *more])
    name = f"{run.task.subtask}-{run.readings[0].encoding}-{hashlib.sha256(everything.encode()).hexdigest()[:12]}"
    return output.with_suffix(f".{name}.safetensors")
