"""One PosGen run in a folder: train into it, test what is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..files import read_header, read_json, user_path
from ..records import check_same
from ..whole import disk_errors, partial_of, whole_file
from .settings import Settings
from .sweep import KIND, from_header, header
from .tasks import Task
from .train import Best, Progress, Run, results, run_training

RUN, CHECKPOINT, WEIGHTS = "run.json", "checkpoint.safetensors", "model.safetensors"
LONGEST = 2**13  # digits of a row: attention looks at their square


def train_into(
    folder: Path,
    preset: str,
    settings: Settings,
    task: Task,
    encoding: str,
    seed: int,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one model in a folder and test it; go on where a stopped run of the same settings was.

    Args:
        folder: gets `run.json` (settings, then the result), `model.safetensors` (the weights with the best validation
            accuracy), and a checkpoint while training.
        preset: the name of the settings.
        settings, task, encoding, seed: what to train.
        on_progress: called after every step.

    Returns:
        A line as of `results`; that in the folder, where the run is finished.

    Raises:
        ValueError: an argument is wrong, or the folder has another run.
        FileExistsError: the folder has something else.
        OSError: the disk is full.
    """
    run = Run(task, settings, (encoding,), (seed,))
    run.splits()  # refuses what does not fit before the folder is made
    folder = user_path(folder)
    wanted = header(preset, settings, task) | {"subtask": task.subtask, "encoding": encoding, "seed": seed}
    record = folder / RUN
    if record.exists():
        found = read_json(record)
        check_same(record, KIND, found, wanted)
        if "result" in found:
            (folder / CHECKPOINT).unlink(missing_ok=True)  # the run may have been killed before it did so
            return found["result"]
    elif folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {partial_of(record)}):
        raise FileExistsError(f"[posgen] {folder} exists and has no {RUN}: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    _write(record, wanted)
    model, best = run_training(run, folder / CHECKPOINT, on_progress)
    result = results(run, model, best)[0]
    with whole_file(folder / WEIGHTS) as partial, disk_errors("posgen", folder / WEIGHTS):
        mx.save_safetensors(str(partial), dict(tree_flatten(model.parameters())))
    _write(record, wanted | {"result": result})
    (folder / CHECKPOINT).unlink()
    return result


def evaluate_from(folder: Path, encoding: str | None = None, length: int | None = None) -> dict[str, Any]:
    """Test a trained model again.

    Args:
        folder: what `train_into` wrote.
        encoding: another one than the weights were chosen for; None for that.
        length: digits of a test row, at most 8192; None for those of the training's settings. Scaling goes with it.

    Returns:
        A line as of `results`, with `settings`; `step` and `validation_id` are those that the weights were chosen by.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder has no finished run, or an argument is wrong.
    """
    folder = user_path(folder)
    record = read_json(folder / RUN)
    if "result" not in record:
        raise ValueError(f"[posgen] {folder} has no finished run: `posgen train` with the same options goes on with it")
    settings, task = from_header(folder / RUN, record, record.get("subtask", ""))
    try:
        trained, seed, step = str(record["encoding"]), int(record["seed"]), int(record["result"]["step"])
        accuracy = float(record["result"]["validation_id"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"[posgen] {folder / RUN} does not say what a run gave: {error!r}") from None
    if length is not None:
        if length > LONGEST:
            raise ValueError(f"[posgen] length must be at most {LONGEST}, got {length}")
        settings = replace(settings, test_length=length)
    chosen = encoding or trained
    run = Run(task, settings, (chosen,), (seed,))
    model = run.model()
    read_header(folder / WEIGHTS)  # refuses what is not whole
    weights: Any = mx.load(str(folder / WEIGHTS))
    model.load_weights(list(weights.items()))
    model.eval()
    best = Best(run, model)
    best.arrays[f"{chosen}.step"] = mx.array([step])
    best.arrays[f"{chosen}.accuracy"] = mx.array([accuracy])
    return results(run, model, best)[0] | {"settings": settings.to_dict()}


def _write(path: Path, record: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
