"""One PosGen run in a folder: train it, test it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import ANOTHER, FileInTheWayError, UsageError, check_option
from ..files import read_header
from ..run_log import RunLog
from ..storage import atomic_file, disk_errors, sha256
from ..wired import wired
from .settings import LONGEST, Settings
from .sweep import FIELDS, KEY, KIND, from_header, header, read_results
from .tasks import Task
from .train import Best, Progress, Run, results, run_training

RUN, CHECKPOINT, WEIGHTS = "run.jsonl", "checkpoint.safetensors", "model.safetensors"


@wired()
def train_into(
    folder: Path,
    preset: str,
    settings: Settings,
    task: Task,
    encoding: str,
    seed: int,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one model in a folder and test it, or resume a run of the same settings that was stopped.

    Args:
        folder: gets `run.jsonl` (the run log of this one result), `model.safetensors` (the weights with the best
            validation accuracy), and a checkpoint while training.
        preset: the name of the settings.
        settings, task, encoding, seed: what to train; of several ramps, the weights are chosen for the first.
        on_progress: called after every step.

    Returns:
        A result as from `results`; the one in the folder if the run is finished.

    Raises:
        UsageError: an argument is wrong, or the folder has another run, or this one's result without its weights.
        FileInTheWayError: the folder has something else.
        OSError: the disk is full.
    """
    settings = replace(settings, ramps=settings.ramps[:1])
    run = Run(task, settings, settings.readings([encoding]), seed)
    run.splits()  # refuse what does not fit before the folder is made
    record = folder / RUN
    if not record.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileInTheWayError(f"{folder} exists and has no {RUN}", remedies=[{"output": ANOTHER}])
    own = dict(zip(KEY, (task.subtask, *run.readings[0], seed), strict=True))
    begun = (folder / CHECKPOINT).exists()
    log = RunLog(record, KIND, header(preset, settings, task) | own, key=KEY, fields=FIELDS, begun=begun)
    result = log.find(*own.values())
    if result is None:
        model, best = run_training(run, folder / CHECKPOINT, on_progress)
        result = results(run, model, best)[0]
        with atomic_file(folder / WEIGHTS) as partial, disk_errors(folder / WEIGHTS):
            mx.save_safetensors(str(partial), dict(tree_flatten(model.parameters())))
        result["weights"] = sha256(folder / WEIGHTS)
        log.append(result)
    elif not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder} has the result of this run but not its {WEIGHTS}", remedies=[{"output": ANOTHER}])
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


@wired()
def evaluate_from(
    folder: Path, encoding: str | None = None, length: int | None = None, ramp: int | None = None
) -> dict[str, Any]:
    """Test a trained model again.

    Args:
        folder: the one that `train_into` wrote.
        encoding: another one than the weights were chosen for; None for that one.
        length: digits of a test row, at most 8192; None for those of the settings. The scaling follows it.
        ramp: tokens over which YaRN's ramp counts turns; None for those of the settings.

    Returns:
        A result as from `results`, without `last` and with `task` and `settings`; `step` and `validation_id` are those
        of the choice of the weights.

    Raises:
        MissingFileError: a file is missing.
        UsageError: the folder has no finished run, or weights of another one, or an argument is wrong.
    """
    found, lines = read_results(folder / RUN, "model")
    if not lines:
        raise UsageError(f"{folder} has no finished run: repeat the training, which resumes", option="model")
    trained = lines[0]
    settings, task = from_header(folder / RUN, found, trained["subtask"])
    if length is not None:
        check_option("length", length <= LONGEST, f"at most {LONGEST}", length)
        settings = replace(settings, test_length=length)
    if ramp is not None:
        settings = replace(settings, ramps=(ramp,))
    encoding = encoding or trained["encoding"]
    check_option("ramp", ramp is None or encoding.endswith("yarn"), "given for YaRN alone", ramp)
    readings = settings.readings([encoding])
    run = Run(task, settings, readings, trained["seed"])
    model = run.model()
    read_header(folder / WEIGHTS)  # refuse a damaged file
    if trained.get("weights", digest := sha256(folder / WEIGHTS)) != digest:
        raise UsageError(f"{folder / WEIGHTS} is not of the run that {folder / RUN} is about", option="model")
    weights: Any = mx.load(str(folder / WEIGHTS))
    model.load_weights(list(weights.items()))
    model.eval()
    best = Best(run, model)
    best.keep(readings[0], trained["step"], trained["validation_id"], model)
    result = results(run, model, best)[0] | {"task": found["task"], "settings": asdict(settings)}
    del result["last"]  # the folder has the best weights alone
    # What was measured with the angles of the training, which these may not be.
    return result | {name: trained[name] for name in ("first", "trained_id", "trained")}
