"""What the notebooks' figures share: how a figure is shown, and the figures of more than one notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_resonance.plots import BLUE, GREY, STYLE, length_axis, look, perplexity_panels

import matplotlib
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

TEXT_GREY = "#555555"  # dark enough for letters


class Picture(Figure):
    """A figure that a notebook shows as the value of a cell, without pyplot and its global state.

    Attributes:
        alt: what it shows, in words.
    """

    alt = ""

    def png(self) -> bytes:
        """The figure as a PNG, at twice the size it is shown at, for sharp screens; few colors make it small."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png", dpi=2 * self.dpi)
        Image.open(buffer).convert("RGB").quantize(48).save(small, format="PNG", optimize=True)
        return small.getvalue()

    def _ipython_display_(self) -> None:
        Live(self)


class Live:
    """A picture on the page and its description below, which another picture can replace.

    JupyterLab drops an image's alt text, and an <img> of HTML while a notebook is not trusted: hence the line of text.

    Args:
        picture: the first one.
    """

    def __init__(self, picture: Picture) -> None:
        self._handles = [display(data, metadata=about, raw=True, display_id=True) for data, about in _parts(picture)]

    def update(self, picture: Picture) -> None:
        """Show another picture in its place."""
        for handle, (data, about) in zip(self._handles, _parts(picture), strict=True):
            handle.update(data, metadata=about, raw=True)


def _parts(picture: Picture) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Data and metadata of the image, and of the line below it."""
    width, height = (round(size) for size in picture.get_size_inches() * picture.dpi)
    about = {"image/png": {"alt": picture.alt, "width": width, "height": height}}
    line = f"<small><i>{html.escape(picture.alt, quote=False)}</i></small>"
    return [
        ({"image/png": picture.png(), "text/plain": "figure"}, about),
        ({"text/html": line, "text/plain": picture.alt}, {}),
    ]


def figure_of(
    alt: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3.2)
) -> tuple[Picture, list[Axes]]:
    """A figure on white, readable on dark pages too, and its axes.

    Args:
        alt: what the figure shows, in words.
        rows, columns: of axes.
        size: width and height in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=size, layout="constrained", facecolor="white", dpi=100)
        axes = figure.subplots(rows, columns, squeeze=False)
    figure.alt = alt
    return figure, list(axes.flat)


@matplotlib.rc_context(STYLE)
def method_lines(
    alt: str, lengths: Sequence[int], curves: Mapping[str, Sequence[float]], ylabel: str, trained: int = 0
) -> Picture:
    """A curve for every method over lengths, with the method's `look`, a little aside of the others.

    Args:
        alt: what the figure shows, in words.
        lengths: tokens, in rising order.
        curves: by name of the method.
        ylabel: with its unit.
        trained: tokens of training, to be marked.
    """
    figure, (axis,) = figure_of(alt)
    for number, (name, values) in enumerate(curves.items()):
        aside = 1.012 ** (number - (len(curves) - 1) / 2)  # curves that coincide show side by side
        axis.plot(np.array(lengths) * aside, values, label=name, **look(name))
    if trained:
        axis.axvline(trained, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="context, tokens", ylabel=ylabel)
    length_axis(axis, lengths)
    axis.legend()
    return figure


@matplotlib.rc_context(STYLE)
def perplexity_over_context(
    alt: str, contexts: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float] | NDArray[np.floating]]]
) -> Picture:
    """Arguments: what the figure shows, in words; then as of `plots.perplexity_panels`."""
    figure = Picture(figsize=(3 * len(panels), 3.6), layout="constrained", facecolor="white", dpi=100)
    figure.alt = alt
    perplexity_panels(figure, contexts, panels)
    return figure


@matplotlib.rc_context(STYLE)
def loss_over_position(losses: Mapping[str, NDArray[np.floating]], train_length: int, window: int) -> Picture:
    """A running mean of the loss over the position; the trained length is marked.

    Args:
        losses: nats per token by the name of the method, shape (tokens,) each.
        train_length: tokens.
        window: positions of the running mean.
    """
    ends = ", ".join(f"{name} at {values[-window:].mean():.2f}" for name, values in losses.items())
    tokens = len(next(iter(losses.values()))) + 1
    figure, (axis,) = figure_of(
        f"Loss over the position, up to {tokens} tokens; trained on {train_length} (grey). At the end: {ends}."
    )
    for name, values in losses.items():
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        axis.plot(np.arange(len(mean)) + 1 + window / 2, mean, label=name, **look(name) | {"marker": ""})
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
    texts = (
        f"{title}: {', '.join(f'{name} {_short(value)}' for name, value in values.items())}."
        for title, values in panels.items()
    )
    figure, axes = figure_of(" ".join(texts), 1, len(panels), (3 * len(panels) if len(panels) > 2 else 7, 2.8))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        drawn = axis.bar(list(values), list(values.values()), color=BLUE, width=0.6)
        axis.bar_label(drawn, [_short(value) for value in values.values()], padding=2)
        axis.set_ylabel(title)
        axis.margins(y=0.15)
        bare_names(axis)
    return figure


def _short(value: float) -> str:
    if value < 1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def bare_names(axis: Axes) -> None:
    """No grid and no ticks under the names of bars."""
    axis.grid(False, axis="x")
    axis.tick_params(axis="x", length=0)
