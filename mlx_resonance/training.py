"""The training loop: a compiled step, checkpoints that a killed run resumes from, learning-rate schedules."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten


def warmup_cosine(peak: float, steps: int, warmup_steps: int, end: float = 0.0) -> Callable[[mx.array], mx.array]:
    """Learning rate that rises linearly to `peak` and falls to `end` along a half cosine.

    Args:
        peak: the highest learning rate.
        steps: number of steps in all.
        warmup_steps: number of steps of the rise, fewer than `steps`.
        end: the learning rate that the fall ends at, after the last step.

    Returns:
        A schedule for any `mlx.optimizers` optimizer: step number to learning rate.

    Raises:
        ValueError: `warmup_steps` does not lie in [0, steps).
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"[warmup_cosine] warmup_steps must lie in [0, {steps}), got {warmup_steps}")
    cosine = optim.cosine_decay(peak, steps - warmup_steps, end)
    if warmup_steps == 0:
        return cosine
    return optim.join_schedules(
        [optim.linear_schedule(peak / warmup_steps, peak, warmup_steps), cosine], [warmup_steps]
    )


def save_checkpoint(path: Path, step: int, model: nn.Module, optimizer: optim.Optimizer) -> None:
    """Write everything the next step depends on, atomically: weights, optimizer state, step number.

    Args:
        path: a `.safetensors` file; its old content stays whole until the new one is.
        step: number of steps that are done.
        model: the model being trained.
        optimizer: its optimizer.
    """
    state = {"model": model.trainable_parameters(), "optimizer": optimizer.state}
    partial_path = path.with_suffix(".partial.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(partial_path), dict(tree_flatten(state)), metadata={"step": str(step)})
    os.replace(partial_path, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote.

    Returns:
        The number of steps that were done.

    Raises:
        ValueError: the file belongs to another model or optimizer.
    """
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded
    expected: dict[str, mx.array] = dict(
        tree_flatten({"model": model.trainable_parameters(), "optimizer": optimizer.state})
    )
    for name, value in expected.items():
        if name not in arrays or arrays[name].shape != value.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise ValueError(f"[load_checkpoint] {path}: expected {name} of shape {value.shape}, found {found}")
    state: Any = tree_unflatten(list(arrays.items()))
    model.update(state["model"])
    optimizer.state = state["optimizer"]
    return int(metadata["step"])


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
    max_grad_norm: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train `model` in place for `steps` steps, going on from `checkpoint` when that file exists.

    A batch is a function of the step number alone, so a killed and resumed run sees the same data and ends
    bit-identical to an uninterrupted one on the CPU.

    Args:
        model: the model; only its trainable parameters change.
        optimizer: an `mlx.optimizers` optimizer, its schedules counting steps.
        loss: `loss(model, *batch)`, a scalar.
        batch: the arrays of one step, by step number from 0.
        steps: number of steps in all, those before a resume counted in.
        seed: MLX's random state at step n is a function of this and n (dropout, sampling inside the loss).
        checkpoint: a `.safetensors` file to write and to resume from; None to keep nothing.
        checkpoint_every: steps between two checkpoints; the last step always writes one.
        max_grad_norm: gradients are scaled down to this global norm.
        on_step: called after every step with the number of steps done and the step's loss.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    optimizer.init(model.trainable_parameters())
    done = load_checkpoint(checkpoint, model, optimizer) if checkpoint and checkpoint.exists() else 0
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*arrays: mx.array) -> mx.array:
        value, gradients = loss_and_grad(model, *arrays)
        gradients, _ = optim.clip_grad_norm(gradients, max_grad_norm)
        optimizer.update(model, gradients)
        return value

    model.train()
    while done < steps:
        mx.random.seed((seed << 32) + done)
        value = step(*batch(done))
        mx.eval(value, state)
        done += 1
        if not mx.isfinite(value).item():
            raise FloatingPointError(f"[train] the loss is {value.item()} at step {done}")
        if checkpoint and (done % checkpoint_every == 0 or done == steps):
            save_checkpoint(checkpoint, done, model, optimizer)
        if on_step:
            on_step(done, float(np.array(value)))
    model.eval()
