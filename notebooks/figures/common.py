"""What the notebooks' figures share: how a figure is shown, and the figures of more than one notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from mlx_resonance.plots import BLUE, GREEN, GREY, MORE_COLORS, ORANGE, STYLE, perplexity_panels

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

TEXT_GREY = "#555555"  # dark enough for letters


class Picture(Figure):
    """A figure that a notebook shows as the value of a cell, without pyplot and its global state."""

    def png(self) -> bytes:
        """The figure as a PNG, at twice the size it is shown at, for sharp screens; few colors make it small."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png", dpi=2 * self.dpi)
        Image.open(buffer).convert("RGB").quantize(32).save(small, format="PNG", optimize=True)
        return small.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        width, height = self.get_size_inches() * self.dpi
        return self.png(), {"width": round(width), "height": round(height)}


def figure_of(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3.2)) -> tuple[Picture, list[Axes]]:
    """A figure on white, readable on dark pages too, and its axes."""
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=size, layout="constrained", facecolor="white", dpi=100)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, log: str = "", mark: float = 0
) -> Picture:
    """Curves over a common axis.

    Args:
        x: the axis.
        curves: by name, at most eight; each may be shorter than the axis so far.
        xlabel, ylabel: with units.
        log: the axes that are logarithmic: "x", "y" or "xy".
        mark: a value to mark on the axis, such as the trained length.
    """
    figure, (axis,) = figure_of()
    for (name, values), color in zip(curves.items(), (GREY, GREEN, ORANGE, BLUE, *MORE_COLORS), strict=False):
        style = "o-" if len(values) < 30 else "-"
        axis.plot(x[: len(values)], values, style, color=color, label=name, markersize=4, linewidth=1.4)
    for letter in log:
        getattr(axis, f"set_{letter}scale")("log")
    if "x" in log and len(x) < 8:  # lengths, which are not powers of 10
        axis.set_xticks(x, [f"{value:,}" for value in x])
        axis.set_xticks([], minor=True)
    if mark:
        axis.axvline(mark, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def perplexity_over_context(
    contexts: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float] | NDArray[np.floating]]]
) -> Picture:
    """Arguments: as of `plots.perplexity_panels`."""
    figure = Picture(figsize=(3 * len(panels), 3.4), layout="constrained", facecolor="white", dpi=100)
    perplexity_panels(figure, contexts, panels)
    return figure


@matplotlib.rc_context(STYLE)
def loss_over_position(losses: Mapping[str, NDArray[np.floating]], train_length: int, window: int) -> Picture:
    """A running mean of the loss over the position; the trained length is marked.

    Args:
        losses: nats per token by name, shape (tokens,) each.
        train_length: tokens.
        window: positions of the running mean.
    """
    figure, (axis,) = figure_of()
    looks = zip((ORANGE, BLUE, GREEN, GREY), ("--", "-", ":", "-."), strict=True)
    for (name, values), (color, style) in zip(losses.items(), looks, strict=False):
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        axis.plot(np.arange(len(mean)) + 1 + window / 2, mean, style, color=color, label=name, linewidth=1.6)
    axis.axvspan(0, train_length, color=GREY, alpha=0.15, linewidth=0)
    axis.text(train_length / 2, 0.1, f"trained on {train_length}", ha="center", color=TEXT_GREY)
    axis.set(xlabel="position", ylabel=f"loss, nats per token\n(mean of {window})", xlim=(0, None), ylim=(0, None))
    axis.legend(loc="lower right")
    return figure


@matplotlib.rc_context(STYLE)
def bar_panels(panels: Mapping[str, Mapping[str, float]]) -> Picture:
    """Panels of bars beside each other, a number on each bar.

    Args:
        panels: by the name of what is measured, with its unit; then by the name of what it is measured on.
    """
    figure, axes = figure_of(1, len(panels), (3.5 * len(panels), 2.8))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        drawn = axis.bar(list(values), list(values.values()), color=BLUE, width=0.6)
        axis.bar_label(drawn, [f"{value:.4g}" for value in values.values()], padding=2)
        axis.set_ylabel(title)
        axis.margins(y=0.15)
        bare_names(axis)
    return figure


def bare_names(axis: Axes) -> None:
    """No grid and no ticks under the names of bars."""
    axis.grid(False, axis="x")
    axis.tick_params(axis="x", length=0)
