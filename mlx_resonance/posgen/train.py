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

from ..rope import ResonanceRoPE
from ..training import OneCycleAdamW, train
from .data import Splits, make_splits, tokens
from .evaluate import generated, in_and_out, teacher_forced
from .model import Decoder
from .settings import DROPOUT_KEYS, Settings
from .tasks import Task

# Steps done, loss per seed, and the accuracies of the last validation, in and out of distribution (NaN before it).
Progress = Callable[[int, float, float, float], None]


@dataclass(frozen=True)
class Run:
    """One training: a task, seeds whose decoders train side by side, and the encodings to choose weights for.

    Args:
        task: the rule to learn.
        settings: everything else.
        encodings: all with the same `settings.training_encoding`.
        seeds: one decoder each; a decoder's result depends on its own seed alone.

    Raises:
        ValueError: an unknown encoding, or encodings that do not share a training.
    """

    task: Task
    settings: Settings
    encodings: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for encoding in self.encodings:
            self.settings.frequencies(encoding, scaled=True)
        if len({self.settings.training_encoding(encoding) for encoding in self.encodings}) != 1:
            raise ValueError(f"[posgen] {', '.join(self.encodings)} are trained with different angles")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"[posgen] seed must lie in [0, 2**32), got {seed}")

    def splits(self) -> Splits:
        """The rows to train on, validate on and test on."""
        settings = self.settings
        return make_splits(self.task, settings.split, settings.sizes, settings.train_length, settings.test_length)

    def model(self) -> Decoder:
        """The decoders as they are before the first step."""
        return Decoder(self.settings.model, self.task.modulus + 5, self.seeds)

    def rope(self, encoding: str, scaled: bool) -> ResonanceRoPE:
        """The rotary op of an encoding; pairs are neighbours, as in the official code."""
        return ResonanceRoPE(self.settings.frequencies(encoding, scaled), traditional=True)


class Best:
    """For each encoding and decoder: the weights with the best in-distribution validation accuracy, the earliest of
    equals. Its arrays, by encoding and name, are what a checkpoint carries.
    """

    def __init__(self, run: Run, model: Decoder) -> None:
        self.run = run
        self.arrays: dict[str, mx.array] = {}
        for encoding in run.encodings:
            self.arrays[f"{encoding}.accuracy"] = mx.full((len(run.seeds),), -1.0)
            self.arrays[f"{encoding}.step"] = mx.zeros((len(run.seeds),), dtype=mx.int32)
            for name, value in _trainable(model).items():
                self.arrays[f"{encoding}.weights.{name}"] = value

    def consider(self, encoding: str, step: int, accuracy: np.ndarray, model: Decoder) -> None:
        """Keep the weights of those decoders that are better now than before; accuracy is of shape (S,)."""
        now = mx.array(accuracy.astype(np.float32))
        better = now > self.arrays[f"{encoding}.accuracy"]
        news = {"accuracy": now, "step": mx.full(now.shape, step, dtype=mx.int32)}
        news |= {f"weights.{name}": value for name, value in _trainable(model).items()}
        for name, value in news.items():
            chosen = better.reshape(-1, *[1] * (value.ndim - 1))
            self.arrays[f"{encoding}.{name}"] = mx.where(chosen, value, self.arrays[f"{encoding}.{name}"])
        mx.eval(self.arrays)

    def load_into(self, model: Decoder, encoding: str) -> None:
        """Give the model the best weights for an encoding."""
        prefix = f"{encoding}.weights."
        weights = [(name.removeprefix(prefix), value) for name, value in self.arrays.items() if name.startswith(prefix)]
        model.update(tree_unflatten(weights))


def run_training(run: Run, checkpoint: Path | None = None, on_progress: Progress | None = None) -> tuple[Decoder, Best]:
    """Train, going on from `checkpoint` when that file exists.

    Args:
        run: what to train.
        checkpoint: a `.safetensors` file, written at every validation; None to keep nothing.
        on_progress: called after every step.

    Returns:
        The decoders after the last step, and the best weights for each encoding.

    Raises:
        ValueError: the checkpoint belongs to another run.
        FloatingPointError: the loss became NaN or infinite.
    """
    settings, task = run.settings, run.task
    splits, model = run.splits(), run.model()
    best = Best(run, model)
    ropes = {encoding: run.rope(encoding, scaled=True) for encoding in run.encodings}
    training_rope = run.rope(run.encodings[0], scaled=settings.train_scaled)
    inside = settings.train_length - task.seed_length
    shown = [float("nan"), float("nan")]

    def loss(model: Decoder, ids: mx.array, keys: mx.array) -> mx.array:
        logits = model(ids[..., :-1], training_rope, dropout_keys=keys, start=task.seed_length)
        losses = nn.losses.cross_entropy(logits, ids[..., task.seed_length + 1 :])
        return losses.mean(axis=(1, 2)).sum()  # the decoders share nothing: each gets the gradient of its own loss

    def on_step(step: int, value: float) -> None:
        if step % settings.validate_every == 0 or step == settings.steps:
            model.eval()
            for encoding, rope in ropes.items():
                counts = teacher_forced(model, rope, splits.validation, task)
                accuracies = in_and_out(counts, len(splits.validation), inside)
                best.consider(encoding, step, accuracies[0], model)
                shown[:] = [float(accuracy.mean()) for accuracy in accuracies]
            model.train()
        if on_progress:
            on_progress(step, value / len(run.seeds), *shown)

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
    """Test the best weights of every encoding and decoder.

    Args:
        run: what was trained.
        model, best: from `run_training`; the model ends with the best weights of the last encoding.

    Returns:
        One dictionary per encoding and seed, for JSON. `correct` counts, for every predicted position, the test rows
        with the right token; `generated` does for text written from the seed alone, `continued` for text written
        from a prompt of the training length.
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
        accuracies = in_and_out(counts, len(rows), inside)
        free_accuracies = in_and_out(free, len(some), inside)
        for i, seed in enumerate(run.seeds):
            line = {
                "subtask": task.subtask,
                "encoding": encoding,
                "seed": seed,
                "step": int(best.arrays[f"{encoding}.step"][i]),
                "validation_id": float(best.arrays[f"{encoding}.accuracy"][i]),
                "id": accuracies[0][i],
                "ood": accuracies[1][i],
                "generated_id": free_accuracies[0][i],
                "generated_ood": free_accuracies[1][i],
                "continued_ood": continued[i].mean() / len(some),
            }
            line = {name: round(float(value), 6) if isinstance(value, float) else value for name, value in line.items()}
            line["correct"], line["rows"] = counts[i].tolist(), len(rows)
            line["generated"], line["continued"] = free[i].tolist(), continued[i].tolist()
            lines.append(line | {"generated_rows": len(some)})
    return lines


def _trainable(model: Decoder) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def _batch(run: Run, rows: np.ndarray, step: int) -> tuple[mx.array, mx.array]:
    """Rows of a step, shape (S, B, 1 + L), and keys for dropout, (S, 2): functions of the seeds and the step."""
    epoch, i = divmod(step, run.settings.steps_per_epoch)
    size = run.settings.batch_size
    chosen = np.stack([_order(seed, epoch, len(rows))[i * size : (i + 1) * size] for seed in run.seeds])
    keys = [[seed, DROPOUT_KEYS * step] for seed in run.seeds]
    return mx.array(rows[chosen]), mx.array(np.array(keys, dtype=np.uint32))


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)
