"""The feature gap that `inspect` shows for rope types whose angles change with the length of a text."""

from __future__ import annotations

from mlx_resonance import RopeConfig
from mlx_resonance.inspection import inspect_rope

import numpy as np
import pytest


def distances(trained: np.ndarray, tested: np.ndarray, train_length: int, test_length: int) -> np.ndarray:
    """By the definition: every angle of the longer text against every one of training."""
    seen = np.exp(2j * np.pi * np.arange(train_length)[:, None] / trained)
    new = np.exp(2j * np.pi * np.arange(train_length, test_length)[:, None] / tested)
    return np.abs(new[:, None] - seen[None]).min(1).max(0)


@pytest.mark.parametrize("prefix", ["", "resonance_"])
def test_a_dynamic_model_was_trained_unscaled(prefix: str) -> None:
    pairs = np.arange(8) / 8
    trained, tested = (2 * np.pi * base**pairs for base in (10000, 10000 * (8 * 4 - 7) ** (16 / 14)))
    found = inspect_rope(RopeConfig(16, f"{prefix}dynamic", 10000.0, 64, {"factor": 8.0}), test_length=256)
    gaps = distances(trained, tested, 64, 256), distances(np.rint(trained), np.rint(tested), 64, 256)
    np.testing.assert_allclose(found.gap, gaps[bool(prefix)], rtol=0, atol=1e-9)
    np.testing.assert_allclose(list(found.gaps().values()), gaps, rtol=0, atol=1e-9)


def test_longrope_was_fine_tuned_with_the_factors_of_long_texts() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    rope = RopeConfig(16, "longrope", 10000.0, 256, factors | {"original_max_position_embeddings": 64})
    wavelengths = 2 * np.pi * 10000 ** (np.arange(8) / 8) * factors["long_factor"]
    np.testing.assert_allclose(inspect_rope(rope).gap, distances(wavelengths, wavelengths, 64, 256), rtol=0, atol=1e-9)
