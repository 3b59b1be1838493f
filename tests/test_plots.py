"""Figures are written in the format that their name asks for."""

from __future__ import annotations

from pathlib import Path

from mlx_resonance.plots import plot_angle_errors, plot_perplexity

import numpy as np
import pytest

ERRORS = {name: [1e-7, 1e-3] for name in ("ours", "ours_yarn", "mlx_lm_yarn", "mx_fast_rope")}


@pytest.mark.parametrize(("name", "start"), [("errors.png", b"\x89PNG"), ("errors.svg", b"<?xml")])
def test_angle_errors(tmp_path: Path, name: str, start: bytes) -> None:
    plot_angle_errors([1, 1000], ERRORS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(("name", "start"), [("curve.png", b"\x89PNG"), ("curve.svg", b"<?xml")])
def test_perplexity(tmp_path: Path, name: str, start: bytes) -> None:
    curves = {"default": [9.0, 8.0, 300.0], "yarn": [9.1, 8.1, 7.6], "resonance_yarn": [9.1, 8.05, 7.4]}
    seeds = {name: np.stack([values, values]) for name, values in curves.items()}
    plot_perplexity([512, 1024, 4096], {"one seed": curves, "two": seeds}, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_format_that_nobody_writes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"errors\.xyz: the suffix must be one of"):
        plot_angle_errors([1, 1000], ERRORS, tmp_path / "errors.xyz")
    assert not list(tmp_path.iterdir())
