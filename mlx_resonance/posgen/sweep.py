"""PosGen's sweep: every subtask, encoding and seed, one JSON line each, appended to a file that says its settings."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import user_path
from .settings import ENCODINGS, Settings
from .tasks import SUBTASKS, Task
from .train import Progress, Run, results, run_training

Line = dict[str, Any]


def header(preset: str, settings: Settings, task: Task) -> Line:
    """The first line of a results file: what all its lines have in common."""
    common = {"arithmetic": task.arithmetic, "modulus": task.modulus, "near": task.near, "far": task.far}
    return {"posgen": 1, "preset": preset, "task": common, "settings": settings.to_dict()}


def read_results(path: Path) -> tuple[Line, list[Line]]:
    """A results file: its header and its lines.

    A last line without its end, which a killed run left, is not counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results file.
    """
    lines = []
    try:
        with open(path, encoding="utf-8") as file:
            for text in file:
                if text.endswith("\n"):
                    lines.append(json.loads(text))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"[posgen] {path}: not the results of a sweep ({error})") from None
    if not lines or not isinstance(lines[0], dict) or lines[0].get("posgen") != 1:
        raise ValueError(f"[posgen] {path}: not the results of a sweep, whose first line says its settings")
    for number, line in enumerate(lines[1:], 2):
        missing = {"subtask", "encoding", "seed", "id", "ood", "correct", "rows"} - set(line)
        if missing:
            raise ValueError(f"[posgen] {path}, line {number}: {', '.join(sorted(missing))} missing")
    return lines[0], lines[1:]


def runs_left(
    settings: Settings, task: Task, subtasks: Sequence[str], encodings: Sequence[str], seeds: Sequence[int],
    together: int, done: Sequence[Line],
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
) -> list[Line]:  # fmt: skip
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
    output = user_path(output)
    for subtask in subtasks:  # refuses what does not fit before the file is made
        Run(replace(task, subtask=subtask), settings, (encodings[0],), tuple(seeds)).splits()
    for encoding in encodings:
        settings.frequencies(encoding, scaled=True)
    _open_results(output, header(preset, settings, task))
    wanted = (settings, task, subtasks, encodings, seeds, together)
    runs = list(runs_left(*wanted, read_results(output)[1]))
    for number, run in enumerate(runs, 1):
        checkpoint = output.with_suffix(f".{_name(run)}.safetensors")
        started = time.perf_counter()
        model, best = run_training(run, checkpoint, on_run(run, number, len(runs)) if on_run else None)
        where = {
            "seconds": round(time.perf_counter() - started, 1),
            "device": mx.default_device().type.name,
            "mlx": version("mlx"),
        }
        have = {_key(line) for line in read_results(output)[1]}
        _append(output, [line | where for line in results(run, model, best) if _key(line) not in have])
        checkpoint.unlink(missing_ok=True)
    return read_results(output)[1]


def _key(line: Line) -> tuple[str, str, int]:
    return line["subtask"], line["encoding"], line["seed"]


def _name(run: Run) -> str:
    """A name that no other run has: one with other settings must not go on from this one's checkpoint."""
    everything = json.dumps([vars(run.task), run.settings.to_dict(), run.encodings, run.seeds])
    return f"{run.task.subtask}-{run.encodings[0]}-{hashlib.sha256(everything.encode()).hexdigest()[:12]}"


def _open_results(output: Path, wanted: Line) -> None:
    """Make the file, or see that it is of these settings and cut off what a killed run left of a line."""
    if not output.exists() or output.stat().st_size == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        _append(output, [wanted])
        return
    see_same(output, read_results(output)[0], wanted)
    with open(output, "rb+") as file:
        whole = file.read()
        if not whole.endswith(b"\n"):
            file.truncate(whole.rfind(b"\n") + 1)


def see_same(path: Path, found: Line, wanted: Line) -> None:
    """Raise ValueError, naming the first difference, where a file is not of the settings that are wanted now."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    for part in wanted:
        if found.get(part) != wanted[part]:
            name, was, now = _difference(part, found.get(part), wanted[part])
            raise ValueError(
                f"[posgen] {path} has results of other settings ({name} is {was} there, {now} now): "
                "give the same ones or another --output"
            )


def _difference(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                return _difference(key, found.get(key), wanted.get(key))
    return name, found, wanted


def _append(output: Path, lines: Sequence[Line]) -> None:
    """One write for all lines, so that another sweep's do not get between; on the disk before this returns."""
    with open(output, "ab", buffering=0) as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
        os.fsync(file.fileno())
