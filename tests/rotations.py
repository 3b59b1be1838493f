"""Shared by the tests of the rotation: a table of frequencies, both layouts, random arrays, the tolerance."""

from __future__ import annotations

from mlx_resonance import yarn_frequencies

import numpy as np
import pytest

MAX_POSITION = 2**31 - 1
PLAIN_YARN = yarn_frequencies(128, 10000, 8, 4096)
YARN = PLAIN_YARN.resonate()
# One rounding of cos and of sin (2⁻²⁵ each, and the scale's), two products and a sum: relative to the pair's length.
ROTATION = 4e-7

layouts = pytest.mark.parametrize("traditional", [False, True], ids=["halves", "neighbours"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
