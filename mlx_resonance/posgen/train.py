"""PosGen's training: one training serves all readings that share it, and keeps the best weights for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UsageError, check_option
from ..rope import ResonanceRoPE
from ..run_log import Record
from ..training import OneCycleAdamW, train
from .data import SPECIAL, Splits, make_splits, tokens
from .evaluate import generated, in_and_out, teacher_forced
from .model import Decoder
from .settings import DROPOUT_KEYS, Reading, Settings, Stage
from .tasks import Int32Array, Task

# Steps done, loss, and the accuracies of the last validation, in and out of distribution (NaN before the first).
Progress = Callable[[int, float, float, float], None]


@dataclass(frozen=True)
class Run:
    """One training: a task, a seed, and the readings to choose weights for.

    Args:
        task: the rule to learn.
        settings: everything else that the result depends on.
        readings: all with the same `settings.training`.
        seed: decides the initial values, the order of the rows and the dropout.

    Raises:
        UsageError: readings that do not share a training, a wrong seed, or a task for which the curriculum's rows are
            too short.
    """

    task: Task
    settings: Settings
    readings: tuple[Reading, ...]
    seed: int

    def __post_init__(self) -> None:
        if len({self.settings.training(reading) for reading in self.readings}) != 1:
            raise UsageError(f"{', '.join(map(str, self.readings))} are trained with different angles")
        check_option("seed", 0 <= self.seed < 2**32, "in [0, 2**32)", self.seed)
        if self.settings.train_length < self.task.seed_length + 2:  # `first` and `trained_id` need a prediction each
            raise UsageError(
                f"near + far must be at most {self.settings.train_length - 2}, two less than the digits of a training "
                f"row, got {self.task.near} + {self.task.far}"
            )
        shortest = min((stage.length for stage in self.settings.curriculum), default=self.task.seed_length + 1)
        if shortest <= self.task.seed_length:
            raise UsageError(
                f"near + far must be less than the {shortest} digits of the first rows, got {self.task.near} + "
                f"{self.task.far}",
                option="preset",
            )

    def splits(self) -> Splits:
        """The rows to train on, validate on and test on."""
        settings = self.settings
        return make_splits(self.task, settings.split, settings.sizes, settings.train_length, settings.test_length)

    def model(self) -> Decoder:
        """The decoder before the first step."""
        return Decoder(self.settings.model, self.task.modulus + SPECIAL, self.seed)

    def rope(self, reading: Reading) -> ResonanceRoPE:
        """The rotary op of a reading, scaled; pairs are neighbours, as in the official code."""
        return ResonanceRoPE(self.settings.frequencies(reading, scaled=True), traditional=True)

    def training_rope(self) -> ResonanceRoPE:
        """The rotary op of the training."""
        return ResonanceRoPE(self.settings.frequencies(self.readings[0], self.settings.train_scaled), traditional=True)


class Best:
    """For each reading, the weights with the best in-distribution validation accuracy; of equals, the earliest.

    Attributes:
        arrays: by reading and name; checkpoints carry them.
    """

    def __init__(self, run: Run, model: Decoder) -> None:
        self.arrays: dict[str, mx.array] = {}
        for reading in run.readings:
            self.keep(reading, 0, -1.0, model)

    def consider(self, reading: Reading, step: int, accuracy: float, model: Decoder) -> None:
        """Keep the model's weights if they are better than those before."""
        if np.float32(accuracy) > self.arrays[f"{reading}.accuracy"].item():
            self.keep(reading, step, accuracy, model)

    def keep(self, reading: Reading, step: int, accuracy: float, model: Decoder) -> None:
        """Keep the model's weights, those after a step, with their accuracy."""
        weights: Any = tree_flatten(model.trainable_parameters())
        self.arrays |= {f"{reading}.weights.{name}": value for name, value in weights}
        self.arrays |= {f"{reading}.accuracy": mx.array(accuracy), f"{reading}.step": mx.array(step)}

    def load_into(self, model: Decoder, reading: Reading) -> None:
        """Give the model the best weights for a reading."""
        prefix = f"{reading}.weights."
        weights = [(name.removeprefix(prefix), value) for name, value in self.arrays.items() if name.startswith(prefix)]
        model.update(tree_unflatten(weights))


def run_training(run: Run, checkpoint: Path | None = None, on_progress: Progress | None = None) -> tuple[Decoder, Best]:
    """Train, or resume from `checkpoint` if that file exists.

    Args:
        run: what to train.
        checkpoint: a `.safetensors` file, written at every validation; None writes none.
        on_progress: called after every step.

    Returns:
        The decoder after the last step, and the best weights for each reading.

    Raises:
        UsageError: the checkpoint belongs to another run.
        FloatingPointError: the loss became NaN or infinite.
    """
    settings, task = run.settings, run.task
    splits, model = run.splits(), run.model()
    best = Best(run, model)
    ropes = {reading: run.rope(reading) for reading in run.readings}
    training_rope = run.training_rope()
    inside = settings.train_length - task.seed_length
    shown = [float("nan"), float("nan")]

    def loss(model: Decoder, ids: mx.array, answers: mx.array, key: mx.array) -> mx.array:
        logits = model(ids[:, :-1], training_rope, dropout_key=key, start=task.seed_length)
        return nn.losses.cross_entropy(logits, answers, reduction="mean")

    def on_step(step: int, value: float) -> None:
        if step % settings.validate_every == 0 or step == settings.steps:
            model.eval()
            for reading, rope in ropes.items():
                counts = teacher_forced(model, rope, splits.validation, task)
                shown[:] = in_and_out(counts, len(splits.validation), inside)
                best.consider(reading, step, shown[0], model)
            model.train()
        if on_progress:
            on_progress(step, value, *shown)

    train(
        model,
        OneCycleAdamW(
            settings.learning_rate,
            settings.steps - settings.curriculum_steps,
            weight_decay=settings.weight_decay,
            hold=settings.curriculum_steps,
            beta_2=settings.beta_2,
        ),
        loss,
        partial(_batch, run, splits.train),
        settings.steps,
        checkpoint=checkpoint,
        checkpoint_every=settings.validate_every,
        max_grad_norm=settings.max_grad_norm,
        on_step=on_step,
        carried=best.arrays,
    )
    return model, best


def results(run: Run, model: Decoder, best: Best) -> list[Record]:
    """Test the best weights of every reading, and those of the last step.

    Args:
        run: what was trained.
        model, best: from `run_training`; the model ends with the best weights of the last reading.

    Returns:
        One dictionary per reading, for JSON: the measures of `_measured` for the best weights, and under `last` for
        those of the last step. `generated` counts the right tokens in text written from the seed alone, `continued` in
        text written from a prompt of the training length.
    """
    settings, task, rows = run.settings, run.task, run.splits().test
    some, inside = rows[: settings.generated_rows], settings.train_length - task.seed_length
    last = [_measured(run, model, reading, rows) for reading in run.readings]
    lines = []
    for reading, after in zip(run.readings, last, strict=True):
        best.load_into(model, reading)
        step = int(best.arrays[f"{reading}.step"])
        measured = after if step == run.settings.steps else _measured(run, model, reading, rows)
        rope = run.rope(reading)
        free = generated(model, rope, some, task, task.seed_length)
        continued = generated(model, rope, some, task, settings.train_length)
        accuracies = {"validation_id": float(best.arrays[f"{reading}.accuracy"])}
        accuracies["generated_id"], accuracies["generated_ood"] = in_and_out(free, len(some), inside)
        accuracies["continued_ood"] = float(continued.mean() / len(some))
        line: Record = {"subtask": task.subtask} | reading._asdict() | {"seed": run.seed}
        line |= {"step": step, "rows": len(rows)} | measured
        line |= {name: round(value, 6) for name, value in accuracies.items()}
        line |= {"generated": free.tolist(), "continued": continued.tolist(), "generated_rows": len(some)}
        lines.append(line | {"last": after})
    return lines


def _measured(run: Run, model: Decoder, reading: Reading, rows: Int32Array) -> Record:
    """Teacher-forced accuracies of the model's weights.

    `id` and `ood`: up to and past the training length. `first` and `trained_id`: of the first prediction and of the
    others up to the training length, read with the angles of the training. `correct` counts, for every predicted
    position, the rows with the right token, `trained` those with the angles of the training.
    """
    task, inside = run.task, run.settings.train_length
    counts = teacher_forced(model, run.rope(reading), rows, task)
    trained = teacher_forced(model, run.training_rope(), rows[:, :inside], task)
    accuracies = dict(zip(("id", "ood"), in_and_out(counts, len(rows), inside - task.seed_length), strict=True))
    accuracies |= dict(zip(("first", "trained_id"), in_and_out(trained, len(rows), 1), strict=True))
    rounded: Record = {name: round(value, 6) for name, value in accuracies.items()}
    return rounded | {"correct": counts.tolist(), "trained": trained.tolist()}


def _batch(run: Run, rows: Int32Array, step: int) -> tuple[mx.array, mx.array, mx.array]:
    """A step's tokens, shape (B, 1 + L), the right answers, (B, L - near - far), and its key for dropout, (2,).

    All are functions of the seed and the step.
    """
    digits = _rows(run, rows, step)
    key = mx.array([run.seed, DROPOUT_KEYS * step], dtype=mx.uint32)
    return mx.array(tokens(digits, run.task.modulus)), mx.array(run.task.answers(digits)), key


def _rows(run: Run, rows: Int32Array, step: int) -> Int32Array:
    """The digits of a step's rows, shape (B, L)."""
    settings, left = run.settings, step
    for stage in settings.curriculum:
        if left < stage.steps:
            size = (settings.batch_size + settings.random_rows) * settings.train_length // stage.length
            if stage.largest:
                return _random_rows(run, stage, step, size)
            chosen = np.random.default_rng([run.seed, step, stage.length]).integers(len(rows), size=size)
            return rows[chosen, : stage.length]
        left -= stage.steps
    epoch, i = divmod(left, settings.steps_per_epoch)
    of_epoch = rows[_order(run.seed, epoch, len(rows))[i * settings.batch_size : (i + 1) * settings.batch_size]]
    if not settings.random_rows:
        return of_epoch
    last = settings.curriculum[-1]._replace(length=settings.train_length)
    return np.concatenate([of_epoch, _random_rows(run, last, step, settings.random_rows)])


def _random_rows(run: Run, stage: Stage, step: int, size: int) -> Int32Array:
    """Rows of random digits, each between two numbers of its own, shape (size, length of the stage)."""
    draw = np.random.default_rng([run.seed, step, stage.length])
    largest = min(stage.largest, run.task.modulus - 1)
    high = draw.integers(min(stage.least, largest), largest, size=(size, 1), endpoint=True)
    low = draw.integers(np.maximum(high - 4, 0), size=(size, 1), endpoint=True)
    return draw.integers(low, high, size=(size, stage.length), dtype=np.int32, endpoint=True)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)
