"""OneCycleAdamW against torch's AdamW under OneCycleLR, and the ends of one_cycle for any number of steps."""

from __future__ import annotations

import math
from typing import Any

from mlx_resonance.training import OneCycleAdamW, one_cycle, train

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

STEPS, PEAK = 60, 0.01
SHAPE = (7, 5)


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array(np.random.default_rng(99).normal(size=SHAPE).astype(np.float32))


def gradient(step: int) -> np.ndarray:
    """Gradients of a different size for every element, so that epsilon and the second moment matter."""
    rng = np.random.default_rng(step)
    return (rng.normal(size=SHAPE) * np.logspace(-7, 2, math.prod(SHAPE)).reshape(SHAPE)).astype(np.float32)


def torch_run(dtype: torch.dtype, beta_2: float) -> tuple[list[np.ndarray], list[float], list[float]]:
    """Parameters after every step, and the learning rate and first beta of each."""
    weight = torch.tensor(np.array(Weight().weight), dtype=dtype, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=PEAK, betas=(0.9, beta_2), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK, total_steps=STEPS, pct_start=0.1, anneal_strategy="cos"
    )
    weights, rates, betas = [], [], []
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        betas.append(group["betas"][0])
        weight.grad = torch.tensor(gradient(step), dtype=dtype)
        optimizer.step()
        schedule.step()
        weights.append(weight.detach().numpy().copy())
    return weights, rates, betas


def our_run(beta_2: float = 0.999) -> tuple[list[np.ndarray], list[float], list[float]]:
    """The same with ours, in the compiled step of `train`."""
    model, optimizer = Weight(), OneCycleAdamW(PEAK, STEPS, weight_decay=0.01, beta_2=beta_2)
    weights, rates, betas = [], [], []

    def on_step(step: int, value: float) -> None:
        weights.append(np.array(model.weight))
        rates.append(optimizer.learning_rate.item())
        betas.append(optimizer.state["beta_1"].item())

    def loss(model: Any, g: mx.array) -> mx.array:
        return (model.weight * g).sum()  # its gradient is g

    train(model, optimizer, loss, lambda step: (mx.array(gradient(step)),), STEPS, max_grad_norm=None, on_step=on_step)
    return weights, rates, betas


@pytest.mark.parametrize("beta_2", [0.999, 0.98])
def test_a_training_run_equals_torchs(beta_2: float) -> None:
    weights, rates, betas = our_run(beta_2)
    expected = torch_run(torch.float64, beta_2)
    assert len(weights) == STEPS
    np.testing.assert_allclose(rates, expected[1], rtol=0, atol=PEAK * 2**-22)
    np.testing.assert_allclose(betas, expected[2], rtol=0, atol=2**-22)
    for step, (ours, theirs) in enumerate(zip(weights, expected[0], strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=f"step {step}")


def test_the_momentum_falls_as_the_rate_rises() -> None:
    _, rates, betas = our_run()
    assert rates[0] == pytest.approx(PEAK / 25, rel=1e-5)
    assert rates[-1] == pytest.approx(PEAK / 250_000)
    assert int(np.argmax(rates)) == int(np.argmin(betas)) == round(0.1 * STEPS) - 1
    assert (betas[0], min(betas), betas[-1]) == pytest.approx((0.95, 0.85, 0.95))


def values(steps: int, rise: float, hold: int = 0) -> list[float]:
    """The values of all steps, or of the last 20 of very many."""
    schedule = one_cycle(1.0, 25.0, 1e-4, steps, rise, hold)
    steps += hold
    first = 0 if steps < 1000 else steps - 20
    return [schedule(mx.array(step, dtype=mx.uint64)).item() for step in range(first, steps)]


# In some of them rise * steps is 1, where torch divides by zero, or less.
@pytest.mark.parametrize("rise", [0.0, 0.1, 0.3, 1 / 49, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 10, 11, 20, 49, 50, 100, 11_850])
def test_every_value_is_finite_and_the_last_is_the_end(steps: int, rise: float) -> None:
    found = values(steps, rise)
    assert np.isfinite(found).all()
    assert min(found) >= 1e-4 * (1 - 1e-5)
    assert max(found) <= 25 * (1 + 1e-6)
    assert found[-1] == pytest.approx(1e-4, rel=1e-5)


@pytest.mark.parametrize(("steps", "rise"), [(10, 0.1), (2, 0.5), (4, 0.25), (20, 0.05)])
def test_a_rise_of_one_step_starts_at_the_peak(steps: int, rise: float) -> None:
    found = values(steps, rise)
    assert found[0] == pytest.approx(25.0)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(("steps", "rise"), [(3, 0.5), (7, 0.3), (12, 0.1), (30, 0.1), (97, 0.33), (100, 0.7)])
def test_every_value_equals_torchs(steps: int, rise: float) -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 25.0, steps, pct_start=rise, cycle_momentum=False, div_factor=25.0, final_div_factor=1e4
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(values(steps, rise), expected, rtol=1e-6, atol=25 * 2**-22)


@pytest.mark.parametrize(("steps", "rise"), [(20, 0.1), (25, 0.1), (10, 0.0), (10, 0.1), (50, 0.5)])
def test_a_held_peak_comes_between_the_rise_and_the_fall(steps: int, rise: float) -> None:
    """The values before the turn and after it are the same; all steps between have the peak."""
    turn, plain, held = rise * steps - 1, values(steps, rise), values(steps, rise, hold=7)
    before, after = math.ceil(max(turn, 0)), steps - math.floor(turn) - 1
    assert held[:before] == plain[:before] and held[-after:] == plain[-after:]
    assert held[before:-after] == pytest.approx([25.0] * (steps + 7 - before - after))
    assert len(held) == steps + 7 and held[before:-after]
