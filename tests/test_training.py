"""The training loop: it learns, resumes bit-identically and refuses checkpoints of other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_resonance.training import train, warmup_linear

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

STEPS = 12


class Killed(Exception):
    pass


def model(width: int = 16) -> nn.Module:
    mx.random.seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 1))


def optimizer() -> optim.Optimizer:
    return optim.MultiOptimizer(
        [optim.Muon(warmup_linear(0.02, STEPS, 3)), optim.AdamW(warmup_linear(0.01, STEPS, 3))],
        [lambda _, weight: weight.ndim == 2],
    )


def batch(step: int) -> tuple[mx.array, mx.array]:
    x = np.random.default_rng(step).normal(size=(32, 4)).astype(np.float32)
    return mx.array(x), mx.array(x.sum(axis=1, keepdims=True))


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), y)


def test_the_loss_falls() -> None:
    losses: list[float] = []
    train(model(), optim.Adam(0.02), loss, batch, 60, on_step=lambda _, value: losses.append(value))
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5])


@pytest.mark.parametrize("killed_at", [1, 5, 8, 11])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, killed_at: int) -> None:
    whole = model()
    train(whole, optimizer(), loss, batch, STEPS, seed=3)

    def kill(step: int, _: float) -> None:
        if step == killed_at:
            raise Killed

    checkpoint = tmp_path / "checkpoint.safetensors"
    options = {"seed": 3, "checkpoint": checkpoint, "checkpoint_every": 4}
    with pytest.raises(Killed):
        train(model(), optimizer(), loss, batch, STEPS, on_step=kill, **options)
    mx.random.seed(99)  # whatever the new process's random state is
    resumed, steps = model(), []
    train(resumed, optimizer(), loss, batch, STEPS, on_step=lambda step, _: steps.append(step), **options)
    assert steps[0] == (killed_at - 1) // 4 * 4 + 1  # killed before the checkpoint of that step
    for (name, one), (_, other) in zip(
        tree_flatten(whole.parameters()), tree_flatten(resumed.parameters()), strict=True
    ):
        assert mx.array_equal(one, other), name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_dropout_depends_on_the_seed() -> None:
    one, other = model(), model()
    train(one, optimizer(), loss, batch, STEPS, seed=3)
    train(other, optimizer(), loss, batch, STEPS, seed=4)
    assert not mx.array_equal(one.layers[0].weight, other.layers[0].weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(model(), optimizer(), loss, batch, 2, checkpoint=tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\w+ of shape"):
        train(model(width=8), optimizer(), loss, batch, STEPS, checkpoint=tmp_path / "c.safetensors")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(model(), optim.Adam(0.01), loss, batch, 1, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged, delete it"):
        train(model(), optim.Adam(0.01), loss, batch, 2, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def broken(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return loss(model, x, y) * float("nan")

    with pytest.raises(FloatingPointError, match="step 1"):
        train(model(), optimizer(), broken, batch, STEPS, checkpoint=tmp_path / "c.safetensors", checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "rate"), [(0, 0.1), (5, 0.55), (10, 1.0), (55, 0.5), (100, 0.0)])
def test_warmup_linear(step: int, rate: float) -> None:
    assert warmup_linear(1.0, 100, 10)(mx.array(step)).item() == pytest.approx(rate, abs=1e-6)


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps"):
        warmup_linear(1.0, 10, 10)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_parts_equal_the_whole_batch(max_grad_norm: float | None) -> None:
    def run(accumulate: int) -> tuple[list[float], nn.Module]:
        net, losses = model(), []
        net.layers[1] = nn.Identity()  # dropout would draw other numbers
        options = {"max_grad_norm": max_grad_norm, "accumulate": accumulate}
        train(net, optim.SGD(0.1), loss, batch, 3, on_step=lambda _, value: losses.append(value), **options)
        return losses, net

    (wanted, whole), (found, parts) = run(1), run(4)
    assert found == pytest.approx(wanted, rel=1e-5)
    for (name, one), (_, other) in zip(tree_flatten(whole.parameters()), tree_flatten(parts.parameters()), strict=True):
        assert mx.max(mx.abs(one - other)).item() < 1e-5, name


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate = 5 does not divide the first axis of \(32, 4\)"):
        train(model(), optim.SGD(0.1), loss, batch, 1, accumulate=5)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train(model(), optimizer(), loss, batch, 2, checkpoint=checkpoint)
    before = checkpoint.read_bytes()

    def full(path: str, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"a part")
        raise RuntimeError("[save_safetensors] Unable to write")  # what MLX says

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match="cannot be written"):
        train(model(), optimizer(), loss, batch, 4, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
