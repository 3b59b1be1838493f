"""mx.export_function of a rotation and of whole models: what is imported again computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance import ResonanceRoPE, RopeConfig, load

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from .rotations import PLAIN_YARN, YARN, normal

LONGROPE = {"short_factor": [1.0] * 64, "long_factor": [3.0] * 64, "original_max_position_embeddings": 8}
FIXED = {"rounded": YARN, "unrounded": PLAIN_YARN}
BY_LENGTH = {  # offset 0 and larger ones are on both sides of the original context
    "dynamic": RopeConfig(128, "resonance_dynamic", 1e4, 8, {"factor": 2.0}).frequencies,
    "longrope": RopeConfig(128, "longrope", 1e4, 64, LONGROPE).frequencies,
}
OFFSETS = {"0": 0, "far": 1_000_003, "scalar array": mx.array(1_000_003), "a row each": mx.array([3, 1_000_003])}
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)


def check(path: Path, function: Callable[..., mx.array], *arguments: mx.array) -> None:
    mx.export_function(str(path), function, *arguments)
    (imported,) = mx.import_function(str(path))(*arguments)
    expected = function(*arguments)
    assert imported.dtype == expected.dtype
    np.testing.assert_allclose(np.array(imported), np.array(expected), rtol=0, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=list(OFFSETS))
@pytest.mark.parametrize("kind", [*FIXED, *BY_LENGTH])
def test_a_rotation_by_a_known_offset(kind: str, offset: Any, dtype: mx.Dtype, tmp_path: Path) -> None:
    rope = ResonanceRoPE((FIXED | BY_LENGTH)[kind])
    q, k = (mx.array(normal(2, heads, 5, 160, seed=heads)).astype(dtype) for heads in (4, 2))
    check(tmp_path / "one.mlxfn", lambda x: rope(x, offset=offset), q)
    check(tmp_path / "both.mlxfn", lambda q, k: mx.concatenate(rope.rotate(q, k, offset), axis=1), q, k)


@DTYPES
@pytest.mark.parametrize("offset", [mx.array(7), mx.array([3, 7])], ids=["scalar", "a row each"])
@pytest.mark.parametrize("kind", FIXED)
def test_the_offset_may_be_an_argument(kind: str, offset: mx.array, dtype: mx.Dtype, tmp_path: Path) -> None:
    rope, path = ResonanceRoPE(FIXED[kind]), tmp_path / "rope.mlxfn"
    x = mx.array(normal(2, 4, 5, 128)).astype(dtype)
    check(path, lambda x, offset: rope(x, offset=offset), x, offset)
    (moved,) = mx.import_function(str(path))(x, offset + 1_000_000)
    np.testing.assert_allclose(np.array(moved), np.array(rope(x, offset=offset + 1_000_000)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_angles_that_change_with_the_length_need_a_known_offset(kind: str, tmp_path: Path) -> None:
    rope, x = ResonanceRoPE(BY_LENGTH[kind]), mx.array(normal(1, 2, 5, 128))

    def shared(x: mx.array, offset: mx.array) -> mx.array:
        with rope.sharing(5, offset, like=x):
            return rope.rotate(x, x, angles=rope.shared)[0]

    for function in (shared, lambda x, offset: rope(x, offset=offset)):
        with pytest.raises(ValueError, match="an offset whose value is known"):
            mx.export_function(str(tmp_path / "rope.mlxfn"), function, x, mx.array(3))


@DTYPES
@pytest.mark.parametrize("factor", [None, 8], ids=["unrounded", "rounded"])
def test_a_model(factor: float | None, dtype: mx.Dtype, checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load(checkpoint, factor=factor)
    model.set_dtype(dtype)
    tokens = mx.array(np.random.default_rng(0).integers(0, 2048, (2, 12)))
    check(tmp_path / "whole.mlxfn", model, tokens)

    before = [KVCache() for _ in model.layers]
    mx.eval(model(tokens, cache=before))

    def step(tokens: mx.array) -> mx.array:
        cache = [KVCache() for _ in before]
        for new, old in zip(cache, before, strict=True):
            # A step writes into its cache.
            new.keys, new.values, new.offset = mx.array(old.keys), mx.array(old.values), old.offset
        return model(tokens, cache=cache)

    check(tmp_path / "step.mlxfn", step, tokens[:, :1])
