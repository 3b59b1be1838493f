"""Figures are written in the format that their suffix names."""

from __future__ import annotations

from pathlib import Path

from mlx_resonance import RopeConfig
from mlx_resonance.errors import UsageError
from mlx_resonance.inspection import inspect_rope
from mlx_resonance.plots import METHODS, look, perplexity_curves, plot_inspection, plot_passkey, plot_perplexity

import numpy as np
import pytest
from matplotlib.figure import Figure

FORMATS = pytest.mark.parametrize(("name", "start"), [("figure.png", b"\x89PNG"), ("figure.svg", b"<?xml")])
INSPECTION = inspect_rope(RopeConfig(dims=16, max_position_embeddings=64))


@FORMATS
def test_inspection(tmp_path: Path, name: str, start: bytes) -> None:
    plot_inspection(INSPECTION, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@FORMATS
def test_passkey(tmp_path: Path, name: str, start: bytes) -> None:
    plot_passkey([512, 1024], [10, 50, 90], np.array([[1, 0.5], [0, 1], [0.25, 0]]), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@FORMATS
def test_perplexity(tmp_path: Path, name: str, start: bytes) -> None:
    curves = {"default": [9.0, 8.0, 300.0], "yarn": [9.1, 8.1, 7.6], "resonance_yarn": [9.1, 8.05, 7.4]}
    seeds = {name: np.stack([values, values]) for name, values in curves.items()}
    plot_perplexity([512, 1024, 4096], {"one seed": curves, "two": seeds}, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"figure\.xyz: the suffix must be one of .*png.*svg") as raised:
        plot_inspection(INSPECTION, tmp_path / "figure.xyz")
    assert raised.value.option == "plot" and not list(tmp_path.iterdir())


def test_every_method_has_a_color_and_a_marker_of_its_own() -> None:
    for prefix in ("", "resonance_"):
        looks = [look(prefix + name) for name in METHODS]
        for key in ("color", "marker"):
            assert len({style[key] for style in looks}) == len(METHODS)
    for name in METHODS:
        plain, rounded = look(name), look(f"resonance_{name}")
        assert plain["marker"] == rounded["marker"] and plain["color"] != rounded["color"]
        # Drawn over the light line, the thin dark one leaves both visible.
        assert plain["linewidth"] > 2 * rounded["linewidth"] and plain["zorder"] < rounded["zorder"]


@pytest.mark.parametrize(
    ("name", "same"),
    [("RoPE", "default"), ("plain", "default"), ("Resonance-YaRN", "resonance_yarn"), ("Dynamic NTK", "dynamic ntk")],
)
def test_a_method_looks_the_same_under_all_its_names(name: str, same: str) -> None:
    assert look(name) == look(same)


def test_models_differ_by_their_lines_and_methods_by_their_colors() -> None:
    axis, values = Figure().subplots(), [9.0, 8.0]
    names = ("a, yarn", "b, yarn", "b, resonance_yarn", "b, dynamic", "b, default, dynamic:128")
    perplexity_curves(axis, [512, 1024], dict.fromkeys(names, values))
    lines = {str(line.get_label()): (line.get_color(), line.get_linestyle()) for line in axis.lines}
    methods = (look(name)["color"] for name in ("yarn", "yarn", "resonance_yarn", "dynamic ntk", "dynamic"))
    assert lines == dict(zip(names, zip(methods, ("-", "--", "--", "--", "--"), strict=True), strict=True))
