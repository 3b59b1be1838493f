"""PosGen's training: one training serves all encodings that share it, and keeps the best weights for each of them."""

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
from ..training import OneCycleAdamW, train
from .data import Splits, make_splits, tokens
from .evaluate import generated, in_and_out, teacher_forced
from .model import Decoder
from .settings import DROPOUT_KEYS, Settings
from .tasks import Task

# Steps done, loss, and the accuracies of the last validation, in and out of distribution (NaN before the first).
Progress = Callable[[int, float, float, float], None]


@dataclass(frozen=True)
class Run:
    """One training: a task, a seed, and the encodings to choose weights for.

    Args:
        task: the rule to learn.
        settings: everything else that the result depends on.
        encodings: all with the same `settings.training_encoding`.
        seed: decides the initial values, the order of the rows and the dropout.

    Raises:
        UsageError: an unknown encoding, encodings that do not share a training, or a wrong seed.
    """

    task: Task
    settings: Settings
    encodings: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        for encoding in self.encodings:
            self.settings.frequencies(encoding, scaled=True)
        if len({self.settings.training_encoding(encoding) for encoding in self.encodings}) != 1:
            raise UsageError(f"{', '.join(self.encodings)} are trained with different angles")
        check_option("seed", 0 <= self.seed < 2**32, "in [0, 2**32)", self.seed)

    def splits(self) -> Splits:
        """The rows to train on, validate on and test on."""
        settings = self.settings
        return make_splits(self.task, settings.split, settings.sizes, settings.train_length, settings.test_length)

    def model(self) -> Decoder:
        """The decoder before the first step."""
        return Decoder(self.settings.model, self.task.modulus + 5, self.seed)

    def rope(self, encoding: str, scaled: bool) -> ResonanceRoPE:
        """The rotary op of an encoding; pairs are neighbours, as in the official code."""
        return ResonanceRoPE(self.settings.frequencies(encoding, scaled), traditional=True)


class Best:
    """For each encoding, the weights with the best in-distribution validation accuracy; of equals, the earliest.

    Attributes:
        arrays: by encoding and name; checkpoints carry them.
    """

    def __init__(self, run: Run, model: Decoder) -> None:
        self.arrays: dict[str, mx.array] = {}
        for encoding in run.encodings:
            self.keep(encoding, 0, -1.0, model)

    def consider(self, encoding: str, step: int, accuracy: float, model: Decoder) -> None:
        """Keep the model's weights if they are better than those before."""
        if np.float32(accuracy) > self.arrays[f"{encoding}.accuracy"].item():
            self.keep(encoding, step, accuracy, model)

    def keep(self, encoding: str, step: int, accuracy: float, model: Decoder) -> None:
        """Keep the model's weights, those after a step, with their accuracy."""
        weights: Any = tree_flatten(model.trainable_parameters())
        self.arrays |= {f"{encoding}.weights.{name}": value for name, value in weights}
        self.arrays |= {f"{encoding}.accuracy": mx.array(accuracy), f"{encoding}.step": mx.array(step)}

    def load_into(self, model: Decoder, encoding: str) -> None:
        """Give the model the best weights for an encoding."""
        prefix = f"{encoding}.weights."
        weights = [(name.removeprefix(prefix), value) for name, value in self.arrays.items() if name.startswith(prefix)]
        model.update(tree_unflatten(weights))


def run_training(run: Run, checkpoint: Path | None = None, on_progress: Progress | None = None) -> tuple[Decoder, Best]:
    """Train, or resume from `checkpoint` if that file exists.

    Args:
        run: what to train.
        checkpoint: a `.safetensors` file, written at every validation; None writes none.
        on_progress: called after every step.

    Returns:
        The decoder after the last step, and the best weights for each encoding.

    Raises:
        UsageError: the checkpoint belongs to another run.
        FloatingPointError: the loss became NaN or infinite.
    """
    settings, task = run.settings, run.task
    splits, model = run.splits(), run.model()
    best = Best(run, model)
    ropes = {encoding: run.rope(encoding, scaled=True) for encoding in run.encodings}
    training_rope = run.rope(run.encodings[0], scaled=settings.train_scaled)
    inside = settings.train_length - task.seed_length
    shown = [float("nan"), float("nan")]

    def loss(model: Decoder, ids: mx.array, key: mx.array) -> mx.array:
        logits = model(ids[:, :-1], training_rope, dropout_key=key, start=task.seed_length)
        return nn.losses.cross_entropy(logits, ids[:, task.seed_length + 1 :], reduction="mean")

    def on_step(step: int, value: float) -> None:
        if step % settings.validate_every == 0 or step == settings.steps:
            model.eval()
            for encoding, rope in ropes.items():
                counts = teacher_forced(model, rope, splits.validation, task)
                shown[:] = in_and_out(counts, len(splits.validation), inside)
                best.consider(encoding, step, shown[0], model)
            model.train()
        if on_progress:
            on_progress(step, value, *shown)

    train(
        model,
        OneCycleAdamW(settings.learning_rate, settings.steps, weight_decay=settings.weight_decay),
        loss,
        partial(_batch, run, tokens(splits.train, task.modulus)),
        settings.steps,
        checkpoint=checkpoint,
        checkpoint_every=settings.validate_every,
        max_grad_norm=None,
        on_step=on_step,
        carried=best.arrays,
    )
    return model, best


def results(run: Run, model: Decoder, best: Best) -> list[dict[str, Any]]:
    """Test the best weights of every encoding.

    Args:
        run: what was trained.
        model, best: from `run_training`; the model ends with the best weights of the last encoding.

    Returns:
        One dictionary per encoding, for JSON. `correct` counts, for every predicted position, the test rows with the
        right token; `generated` counts them in text written from the seed alone, `continued` in text written from a
        prompt of the training length.
    """
    settings, task, rows = run.settings, run.task, run.splits().test
    some = rows[: settings.generated_rows]
    inside = settings.train_length - task.seed_length
    lines = []
    for encoding in run.encodings:
        best.load_into(model, encoding)
        rope = run.rope(encoding, scaled=True)
        counts = teacher_forced(model, rope, rows, task)
        free = generated(model, rope, some, task, task.seed_length)
        continued = generated(model, rope, some, task, settings.train_length)
        accuracies = {"validation_id": float(best.arrays[f"{encoding}.accuracy"])}
        accuracies["id"], accuracies["ood"] = in_and_out(counts, len(rows), inside)
        accuracies["generated_id"], accuracies["generated_ood"] = in_and_out(free, len(some), inside)
        accuracies["continued_ood"] = float(continued.mean() / len(some))
        step = int(best.arrays[f"{encoding}.step"])
        line: dict[str, Any] = {"subtask": task.subtask, "encoding": encoding, "seed": run.seed, "step": step}
        line |= {name: round(value, 6) for name, value in accuracies.items()}
        line |= {"correct": counts.tolist(), "rows": len(rows)}
        line |= {"generated": free.tolist(), "continued": continued.tolist(), "generated_rows": len(some)}
        lines.append(line)
    return lines


def _batch(run: Run, rows: np.ndarray, step: int) -> tuple[mx.array, mx.array]:
    """The rows of a step, shape (B, 1 + L), and its key for dropout, (2,): functions of the seed and the step."""
    epoch, i = divmod(step, run.settings.steps_per_epoch)
    size = run.settings.batch_size
    chosen = _order(run.seed, epoch, len(rows))[i * size : (i + 1) * size]
    return mx.array(rows[chosen]), mx.array([run.seed, DROPOUT_KEYS * step], dtype=mx.uint32)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)
