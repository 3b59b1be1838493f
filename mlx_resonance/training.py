"""The training loop: a compiled step, checkpoints that a killed run resumes from, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .errors import UsageError, check_option
from .storage import atomic_file, disk_errors

Schedule = Callable[[mx.array], mx.array]


def warmup_linear(peak: float, steps: int, warmup_steps: int) -> Schedule:
    """Learning rate that rises linearly to `peak` and falls linearly to 0.

    The first step has a learning rate above 0; transformers' schedule wastes that step.

    Args:
        peak: the highest learning rate.
        steps: total number of steps.
        warmup_steps: number of steps that the rate rises for, fewer than `steps`.

    Returns:
        A schedule for any `mlx.optimizers` optimizer: step number to learning rate.

    Raises:
        UsageError: `warmup_steps` is not in [0, steps).

    Source: jquesnelle/yarn `finetune.py`, get_linear_schedule_with_warmup; its DeepSpeed settings use WarmupDecayLR.
    """
    check_option("warmup_steps", 0 <= warmup_steps < steps, f"in [0, {steps})", warmup_steps)
    fall = optim.linear_schedule(peak, 0.0, steps - warmup_steps)
    if warmup_steps == 0:
        return fall
    rise = optim.linear_schedule(peak / warmup_steps, peak, warmup_steps)
    return optim.join_schedules([rise, fall], [warmup_steps])


def one_cycle(start: float, peak: float, end: float, steps: int, rise: float = 0.1, hold: int = 0) -> Schedule:
    """A value that rises from `start` to `peak` and falls to `end`, along half a cosine each.

    Args:
        start, peak, end: the values at the first step, at the turn, at the last step. If the rise takes no more than
            one step, the value starts at `peak`.
        steps: number of steps without those that hold the peak.
        rise: the fraction of the steps before the turn, below 1.
        hold: number of further steps at the turn.

    Returns:
        A schedule: step number to value.

    Source: torch `optim/lr_scheduler.py`, OneCycleLR with anneal_strategy="cos"; arXiv 1708.07120.
    """
    turn, last = rise * steps - 1, steps - 1

    def anneal(a: float, b: float, part: mx.array) -> mx.array:
        return b + (a - b) / 2 * (mx.cos(math.pi * part) + 1)

    def schedule(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        if hold:
            step = mx.where(step < turn, step, mx.maximum(step - hold, turn))
        before = anneal(start, peak, step / turn if turn else mx.ones_like(step))
        return mx.where(step <= turn, before, anneal(peak, end, (step - turn) / max(last - turn, 1e-9)))

    return schedule


class OneCycleAdamW(optim.AdamW):
    """AdamW under torch's one-cycle policy: the learning rate rises and falls while momentum beta_1 falls and rises.

    Args:
        peak: the highest learning rate; the first is a 25th of it, the last a 250 000th.
        steps: number of steps of the cycle.
        weight_decay: decoupled; multiplied by the learning rate.
        hold: number of further steps at the peak.
        beta_2: how slowly the mean of the squared gradients forgets.

    Source: torch `optim/adamw.py` with `optim/lr_scheduler.py`, OneCycleLR and its defaults; but
        pct_start is 0.1 as in sheryc/resonance_rope `configs/experiment/sweep.yaml`.
    """

    def __init__(
        self, peak: float, steps: int, weight_decay: float = 0.01, hold: int = 0, beta_2: float = 0.999
    ) -> None:
        rate = one_cycle(peak / 25, peak, peak / 25 / 1e4, steps, hold=hold)
        super().__init__(rate, betas=[0.9, beta_2], weight_decay=weight_decay, bias_correction=True)
        self._maybe_schedule("beta_1", one_cycle(0.95, 0.85, 0.95, steps, hold=hold))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Update one parameter with this step's momentum."""
        fixed, self.betas = self.betas, [self.state["beta_1"], self.betas[1]]
        updated = super().apply_single(gradient, parameter, state)
        self.betas = fixed  # not the array that the compiler traced
        return updated


def save_checkpoint(
    path: Path, step: int, model: nn.Module, optimizer: optim.Optimizer, carried: Mapping[str, mx.array] | None = None
) -> None:
    """Atomically write what the next step depends on: weights, optimizer state, step number.

    Args:
        path: a `.safetensors` file.
        step: number of steps done.
        model, optimizer: in training.
        carried: other arrays that belong to the run.

    Raises:
        OSError: the file cannot be written, e.g. because the disk is full; an older file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = _state(model, optimizer, carried)
    with atomic_file(path) as partial_path, disk_errors(path):
        mx.save_safetensors(str(partial_path), arrays, metadata={"step": str(step)})


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, carried: dict[str, mx.array] | None = None
) -> int:
    """Restore what `save_checkpoint` wrote, `carried` in place.

    Returns:
        The number of completed steps.

    Raises:
        UsageError: the file is damaged, or belongs to another model or optimizer.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
    except RuntimeError as error:
        raise UsageError(f"{path} is damaged, delete it to start again: {error}") from None
    arrays, metadata = loaded
    for name, value in _state(model, optimizer, carried).items():
        if name not in arrays or arrays[name].shape != value.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise UsageError(f"{path}: expected {name} of shape {value.shape}, found {found}")
    state: Any = tree_unflatten(list(arrays.items()))
    model.update(state["model"])
    optimizer.state = state["optimizer"]
    if carried is not None:
        carried |= {name: arrays[f"carried.{name}"] for name in carried}
    return int(metadata["step"])


def _state(model: nn.Module, optimizer: optim.Optimizer, carried: Mapping[str, mx.array] | None) -> dict[str, mx.array]:
    state = {"model": model.trainable_parameters(), "optimizer": optimizer.state}
    return dict(tree_flatten(state)) | {f"carried.{name}": value for name, value in (carried or {}).items()}


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    loss: Callable[..., mx.array],
    batch: Callable[[int], tuple[mx.array, ...]],
    steps: int,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    max_grad_norm: float | None = 1.0,
    on_step: Callable[[int, float], None] | None = None,
    carried: dict[str, mx.array] | None = None,
    accumulate: int = 1,
    loss_scale: float = 1.0,
) -> None:
    """Train `model` in place for `steps` steps, or resume from `checkpoint` if that file exists.

    A batch is a function of the step number alone, so a run that was killed and resumed sees the same data as an
    uninterrupted one and, on the CPU, ends bit-identical to it.

    Args:
        model: the model; only its trainable parameters change.
        optimizer: an `mlx.optimizers` optimizer, its schedules counting steps.
        loss: `loss(model, *batch)`, a scalar.
        batch: the arrays of one step, by step number from 0.
        steps: total number of steps, including those before a resume.
        seed: MLX's random state at step n is a function of this and n (dropout, sampling inside the loss).
        checkpoint: a `.safetensors` file to write and to resume from; None writes none.
        checkpoint_every: steps between two checkpoints; the last step always writes one.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        on_step: called after every step, before a checkpoint, with the number of completed steps and the step's loss.
        carried: arrays that belong to the run, such as the best weights so far. Checkpoints keep them; `on_step` may
            replace them with others of the same shape.
        accumulate: number of equal parts that a batch is split into along its first axis. They pass through the model
            one after another; loss and gradients are the means over them.
        loss_scale: the loss is multiplied by this while gradients are computed, and they are divided by it, a power of
            two: in float16, small ones would vanish.

    Raises:
        UsageError: `accumulate` does not divide a batch, or the checkpoint belongs to another run.
        FloatingPointError: the loss, or with `loss_scale` a gradient, became NaN or infinite.
    """
    optimizer.init(model.trainable_parameters())
    done = load_checkpoint(checkpoint, model, optimizer, carried) if checkpoint and checkpoint.exists() else 0
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = _loss_and_grad(model, loss, loss_scale)
    step = _step(model, optimizer, loss_and_grad, state, max_grad_norm, accumulate)
    model.train()
    while done < steps:
        mx.random.seed((seed << 32) + done)
        value = step(*batch(done))
        mx.eval(value, state)
        done += 1
        if not mx.isfinite(value).item():
            raise FloatingPointError(f"the loss is {value.item()} at step {done}")
        if on_step:
            on_step(done, float(np.array(value)))
        if checkpoint and (done % checkpoint_every == 0 or done == steps):
            save_checkpoint(checkpoint, done, model, optimizer, carried)
    model.eval()


def _loss_and_grad(model: nn.Module, loss: Callable[..., mx.array], scale: float) -> Callable[..., Any]:
    """Loss and gradients, of a model and the arrays of a batch; they are scaled while they are computed."""
    if scale == 1:
        return nn.value_and_grad(model, loss)
    scaled = nn.value_and_grad(model, lambda model, *arrays: loss(model, *arrays) * scale)

    def unscaled(model: nn.Module, *arrays: mx.array) -> Any:
        value, gradients = scaled(model, *arrays)
        overflow = sum(mx.sum(0 * array) for array in dict(tree_flatten(gradients)).values())  # 0, or else NaN
        return value / scale + overflow, tree_map(lambda gradient: gradient / scale, gradients)

    return unscaled


def _step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    loss_and_grad: Callable[..., Any],
    state: list[Any],
    max_grad_norm: float | None,
    accumulate: int,
) -> Callable[..., mx.array]:
    """One update from the arrays of one batch: compiled as a whole, or part by part."""

    def update(gradients: Any) -> None:
        if max_grad_norm is not None:
            gradients, _ = optim.clip_grad_norm(gradients, max_grad_norm)
        optimizer.update(model, gradients)

    @partial(mx.compile, inputs=state, outputs=state)
    def whole(*arrays: mx.array) -> mx.array:
        value, gradients = loss_and_grad(model, *arrays)
        update(gradients)
        return value

    @partial(mx.compile, inputs=state, outputs=state)
    def add(mean: Any, *arrays: mx.array) -> Any:
        return tree_map(lambda sum, part: sum + part / accumulate, mean, loss_and_grad(model, *arrays))

    def in_parts(*arrays: mx.array) -> mx.array:
        if any(array.shape[0] % accumulate for array in arrays):
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise UsageError(
                f"accumulate = {accumulate} does not divide the first axis of {shapes}", option="accumulate"
            )
        mean: Any = (mx.array(0.0), tree_map(mx.zeros_like, model.trainable_parameters()))
        for part in zip(*(mx.split(array, accumulate) for array in arrays), strict=True):
            mean = add(mean, *part)
            mx.eval(mean, state)  # one part's activations at a time
        update(mean[1])  # not compiled: that would keep the old weights beside the new ones
        return mean[0]

    return whole if accumulate == 1 else in_parts
