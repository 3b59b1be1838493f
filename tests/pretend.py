"""A GPU where there is none: launches of the kernel that its twin carries out, counted."""

from __future__ import annotations

from typing import Any

from mlx_resonance.kernels import PhaseConstants, gpu, kernel, trial

import mlx.core as mx
import numpy as np
import pytest


def constants_of(packed: mx.array) -> PhaseConstants:
    """The constants, from the array that the kernel reads."""
    values = np.array(packed)
    pairs = values.size // 2
    modulus, scale = values[:pairs].astype(np.uint32), values[-1:].astype(np.uint32).view(np.float32)
    return PhaseConstants(mx.array(modulus), mx.array(values[pairs:-1]), mx.array(scale), packed)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let the op find a GPU whose kernel has passed its trial.

    Returns:
        Counts that grow: `transformable`, the calls of the op that MLX could differentiate; and `all` launches.
    """
    counts = {"transformable": 0, "all": 0}

    def build(backend: str, heads: int, traditional: bool, backward: bool) -> Any:
        def launch(*, inputs: list[mx.array], output_shapes: list[Any], **_: object) -> list[mx.array]:
            counts["all"] += 1
            q, k, offset, packed = inputs
            xs = [q] if output_shapes[1] == (1,) else [q, k]
            offset = offset[:, 0] if offset.shape[1] == 1 else offset
            rotated = gpu.twin(xs, offset, constants_of(packed), traditional, backward)
            return [*rotated, mx.zeros(1)][:2]

        return launch

    def transformable(*call: Any) -> list[mx.array]:
        counts["transformable"] += 1
        return rotate(*call)

    rotate = gpu.rotate
    monkeypatch.setattr(trial, "current_backend", lambda: "metal")
    monkeypatch.setattr(trial, "fault", lambda variant: None)
    monkeypatch.setattr(kernel, "build", build)
    monkeypatch.setattr(gpu, "rotate", transformable)
    return counts
