"""Figures of the notebooks 1, 2 and 5, in the style of `plots`; each function returns a figure for a cell to show."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from .frequencies import RotaryFrequencies, default_frequencies, feature_gap, yarn_frequencies
from .inspection import Inspection
from .plots import BLUE, GREEN, GREY, ORANGE, STYLE

COLORS = (GREY, GREEN, ORANGE, BLUE, "#CC79A7", "#E69F00", "#56B4E9", "black")


class Picture(Figure):
    """A figure that a notebook shows as the value of a cell, without pyplot and its global state."""

    def png(self) -> bytes:
        """The figure as a PNG, at twice the size it is shown at, for sharp screens; few colours make it small."""
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


@matplotlib.rc_context(STYLE)
def circles(wavelengths: Sequence[float], train_length: int, test_length: int) -> Picture:
    """The angles of one feature pair on the circle: those seen in training, and outside them those of a longer text.

    Args:
        wavelengths: tokens per turn, one circle each.
        train_length, test_length: in tokens.
    """
    figure, axes = figure_of(1, len(wavelengths), (2.5 * len(wavelengths), 3.1))
    turn = np.linspace(0, 2 * np.pi, 200)
    for axis, wavelength in zip(axes, wavelengths, strict=True):
        axis.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=0.5)
        for start, end, color, radius, marker in (
            (0, train_length, BLUE, 1.0, "o"),
            (train_length, test_length, ORANGE, 1.16, "^"),
        ):
            angle = 2 * np.pi * (np.arange(start, end) / wavelength % 1)
            label = f"positions {start} to {end - 1}"
            axis.plot(radius * np.cos(angle), radius * np.sin(angle), marker, color=color, markersize=4, label=label)
        axis.set(title=f"wavelength {wavelength:.4g}", aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@matplotlib.rc_context(STYLE)
def wavelengths(frequencies: RotaryFrequencies, train_length: int, test_length: int) -> Picture:
    """Every pair's wavelength, beside the two lengths.

    Args:
        frequencies: of plain RoPE or any other.
        train_length, test_length: in tokens.
    """
    figure, (axis,) = figure_of()
    _wavelengths(axis, frequencies, train_length, test_length)
    return figure


@matplotlib.rc_context(STYLE)
def gaps(frequencies: Mapping[str, RotaryFrequencies], train_length: int, test_length: int) -> Picture:
    """The feature gap of every pair.

    Args:
        frequencies: by name, two to four.
        train_length, test_length: in tokens.
    """
    figure, (axis,) = figure_of()
    _gaps(axis, frequencies, train_length, test_length)
    return figure


@matplotlib.rc_context(STYLE)
def shifts(frequencies: RotaryFrequencies) -> Picture:
    """By how much rounding changes every pair's wavelength, and the most that it can.

    Args:
        frequencies: not rounded.
    """
    figure, (axis,) = figure_of()
    pairs = np.arange(len(frequencies.wavelengths))
    axis.plot(pairs, 50 / frequencies.wavelengths, "--", color=GREY, label="half a token", linewidth=1)
    axis.bar(pairs, 100 * frequencies.angle_shift(), color=BLUE, label="rounding")
    axis.set(yscale="log", xlabel="feature pair", ylabel="change of the wavelength, %")
    axis.legend(loc="upper right")
    return figure


@matplotlib.rc_context(STYLE)
def arcs(plain: RotaryFrequencies, scaled: RotaryFrequencies, train_length: int, test_length: int) -> Picture:
    """By how much a scaling stretches every pair, and the part of the circle that each then passes through.

    Args:
        plain, scaled: before and after.
        train_length, test_length: in tokens.
    """
    figure, (left, right) = figure_of(1, 2, (8.5, 3.2))
    pairs = np.arange(len(plain.wavelengths))
    left.plot(pairs, scaled.wavelengths / plain.wavelengths, "o-", color=BLUE, markersize=3, linewidth=0.8)
    left.set(xlabel="feature pair", ylabel="wavelength, times that of RoPE")
    for frequencies, length, color, style, label in (
        (plain, test_length, ORANGE, "--", f"RoPE, {test_length} tokens"),
        (scaled, test_length, BLUE, "-", f"YaRN, {test_length} tokens"),
        (plain, train_length, "black", ":", f"seen in training, {train_length} tokens"),
    ):
        arc = np.minimum(length / frequencies.wavelengths, 1)
        right.plot(pairs, 100 * arc, style, color=color, label=label, linewidth=1.6)
    right.set(xlabel="feature pair", ylabel="part of the circle, %", ylim=(0, 104))
    right.legend(loc="lower left")
    return figure


@matplotlib.rc_context(STYLE)
def playground(base: float, head_dim: int, factor: float, trained: int, times: int) -> Picture:
    """Wavelengths and feature gap for settings of one's own: the figure under the sliders.

    Args:
        base: `rope_theta`.
        head_dim: features of a head.
        factor: YaRN's; 1 for plain RoPE.
        trained: tokens seen in training.
        times: how many times as long the text is.
    """
    plain, length = default_frequencies(head_dim, base), times * trained
    scaled = plain if factor == 1 else yarn_frequencies(head_dim, base, factor, trained)
    figure = _wavelengths_and_gaps(scaled, trained, length)
    if factor != 1:
        pairs = np.arange(head_dim // 2)
        figure.axes[0].plot(pairs, plain.wavelengths, "--", color=GREY, linewidth=0.8, zorder=1)
    name = "RoPE" if factor == 1 else f"YaRN, factor {factor:g}"
    critical = scaled.resonate().critical_pairs(trained)
    figure.suptitle(
        f"{name}, base {base:g}, trained on {trained} tokens, read at {length}: "
        f"{critical} of {head_dim // 2} pairs pre-critical",
        fontsize=9,
    )
    return figure


@matplotlib.rc_context(STYLE)
def inspected(inspection: Inspection) -> Picture:
    """Wavelengths and feature gap of a checkpoint, before and after rounding.

    Args:
        inspection: from `inspect_rope`.
    """
    figure = _wavelengths_and_gaps(inspection.unrounded, inspection.train_length, inspection.test_length)
    figure.suptitle(f"{inspection.rope.rope_type}, base {inspection.rope.base:g}", fontsize=9)
    return figure


@matplotlib.rc_context(STYLE)
def losses(by_name: Mapping[str, NDArray[np.floating]], train_length: int, window: int) -> Picture:
    """The loss over the position, a running mean over rows and neighbours.

    Args:
        by_name: nats per token, shape (rows, tokens) each.
        train_length: tokens, marked.
        window: positions that a point is the mean of.
    """
    figure, (axis,) = figure_of()
    styles = zip(by_name.items(), (ORANGE, "black", BLUE, GREY), ("-", "--", "-", ":"), strict=False)
    for (name, values), color, style in styles:
        mean = np.convolve(values.mean(axis=0), np.ones(window) / window, "valid")
        above = 3 if style == "--" else 2  # what coincides stays in sight
        axis.plot(np.arange(len(mean)) + window / 2, mean, style, color=color, label=name, linewidth=1.4, zorder=above)
    axis.axvline(train_length, color="black", linewidth=0.8, linestyle=":")
    axis.text(train_length, axis.get_ylim()[1], f" trained on {train_length}", va="top", color="#555555")
    axis.set(xlabel="position", ylabel="loss, nats per token")
    axis.legend(loc="upper left")
    return figure


@matplotlib.rc_context(STYLE)
def costs(panels: Mapping[str, Mapping[str, float]]) -> Picture:
    """Panels of bars beside each other, a number on each bar.

    Args:
        panels: by the name of what is measured, with its unit; then by the name of what it is measured on.
    """
    figure, axes = figure_of(1, len(panels), (8.5, 3))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        drawn = axis.bar(list(values), list(values.values()), color=BLUE, width=0.6)
        axis.bar_label(drawn, [f"{value:.3g}" for value in values.values()], padding=2)
        axis.set_title(title, fontsize=9)
        axis.margins(y=0.15)
        axis.grid(False, axis="x")
        axis.tick_params(axis="x", length=0)
    return figure


@matplotlib.rc_context(STYLE)
def errors(positions: Sequence[int], measured: Mapping[str, Sequence[float]], bound: float, ylabel: str) -> Picture:
    """Errors over the position, both logarithmic, and the bound that one of them keeps.

    Args:
        positions: in tokens.
        measured: by name, one number for each position.
        bound: of the last of them.
        ylabel: of which number.
    """
    figure, (axis,) = figure_of()
    for (name, values), color, style in zip(measured.items(), (ORANGE, BLUE), ("o--", "s-"), strict=True):
        axis.plot(positions, values, style, color=color, label=name, markersize=4, linewidth=1.4)
    axis.axhline(bound, color="black", linewidth=0.8, linestyle=":", label=f"bound {bound:g}".replace("e-0", "e-"))
    axis.set(xscale="log", yscale="log", xlabel="position", ylabel=ylabel, ylim=(2e-8, 8))
    axis.legend(loc="center left")
    return figure


def _wavelengths_and_gaps(frequencies: RotaryFrequencies, train_length: int, test_length: int) -> Picture:
    figure, (left, right) = figure_of(1, 2, (8.5, 3.4))
    _wavelengths(left, frequencies, train_length, test_length)
    _gaps(right, {"as computed": frequencies, "rounded": frequencies.resonate()}, train_length, test_length)
    return figure


def _wavelengths(axis: Axes, frequencies: RotaryFrequencies, train_length: int, test_length: int) -> None:
    pairs, values = np.arange(len(frequencies.wavelengths)), frequencies.wavelengths
    inside = values <= train_length
    axis.plot(pairs[inside], values[inside], "o", color=BLUE, markersize=4, label="turns fully in training")
    axis.plot(pairs[~inside], values[~inside], "^", color=ORANGE, markersize=4, label="does not")
    for length, name in ((train_length, "trained on"), (test_length, "read at")):
        axis.axhline(length, color=GREY, linewidth=0.8, linestyle="--")
        axis.text(0, length, f"{name} {length}", va="bottom", color="#555555")
    axis.set(yscale="log", xlabel="feature pair", ylabel="wavelength, tokens per turn")
    axis.legend(loc="lower right")


def _gaps(axis: Axes, frequencies: Mapping[str, RotaryFrequencies], train_length: int, test_length: int) -> None:
    drawn = zip(frequencies.items(), (ORANGE, BLUE, GREEN, GREY), ("^", "o", "s", "x"), (7, 3, 5, 5), strict=False)
    for (name, each), color, marker, size in drawn:
        gap = feature_gap(each, train_length, test_length)
        axis.plot(np.arange(len(gap)), gap, marker, color=color, label=name, markersize=size)
    axis.set_yscale("symlog", linthresh=1e-3)  # a gap of exactly zero has its place
    axis.set(xlabel="feature pair", ylabel="feature gap", ylim=(-2e-4, 4))
    axis.set_yticks([0, 1e-3, 1e-2, 0.1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    axis.minorticks_off()
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.12))


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, log: str = "", mark: float = 0
) -> Picture:
    """Curves over a common axis.

    Args:
        x: the axis.
        curves: by name; None stands for what is not known yet.
        xlabel, ylabel: with units.
        log: the axes that are logarithmic: "x", "y" or "xy".
        mark: a place on the axis to mark, such as the trained length.
    """
    figure, (axis,) = figure_of()
    for (name, values), color in zip(curves.items(), COLORS, strict=False):
        style = "o-" if len(values) < 30 else "-"
        axis.plot(x[: len(values)], values, style, color=color, label=name, markersize=4, linewidth=1.4)
    for letter in log:
        getattr(axis, f"set_{letter}scale")("log")
    if mark:
        axis.axvline(mark, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False)
    return figure
