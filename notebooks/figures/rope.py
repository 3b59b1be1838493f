"""Figures of notebooks 1 and 2: wavelengths, angles and gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_resonance.frequencies import (
    Float64Array,
    RotaryFrequencies,
    default_frequencies,
    feature_gap,
    yarn_frequencies,
)
from mlx_resonance.inspection import Inspection
from mlx_resonance.plots import BLUE, GREY, ORANGE, STYLE, gap_panel, legend_below, look

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from .common import TEXT_GREY, Picture, figure_of


@matplotlib.rc_context(STYLE)
def circles(wavelengths: Sequence[float], train_length: int, test_length: int) -> Picture:
    """The angles of one feature pair on the circle: inside those seen in training, outside those of a longer text.

    Args:
        wavelengths: tokens per turn, one circle each.
        train_length, test_length: in tokens.
    """
    lengths = ", ".join(f"{wavelength:.4g}" for wavelength in wavelengths)
    figure, axes = figure_of(
        f"Circles for wavelengths of {lengths} tokens: the angles of positions 0 to {train_length - 1} as dots, those "
        f"of {train_length} to {test_length - 1} as triangles just outside.",
        1, len(wavelengths), (2.5 * len(wavelengths), 3.1),
    )  # fmt: skip
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
    legend_below(figure, 2)
    return figure


@matplotlib.rc_context(STYLE)
def wavelengths(frequencies: RotaryFrequencies, train_length: int, test_length: int) -> Picture:
    """Every pair's wavelength, beside the two lengths.

    Args:
        frequencies: of plain RoPE or any other.
        train_length, test_length: in tokens.
    """
    values = frequencies.wavelengths
    figure, (axis,) = figure_of(
        f"Wavelengths of {len(values)} pairs, from {values[0]:.2f} to {values[-1]:,.0f} tokens, on a logarithmic "
        f"scale; {np.sum(values > train_length)} are longer than the {train_length:,} tokens of training."
    )
    _wavelengths(axis, frequencies, train_length, test_length)
    return figure


@matplotlib.rc_context(STYLE)
def gaps(gaps: Mapping[str, Float64Array]) -> Picture:
    """The feature gap of every pair.

    Args:
        gaps: from `feature_gap`, by name, two to four.
    """
    figure, (axis,) = figure_of("The " + _gaps_in_words(gaps))
    gap_panel(axis, gaps)
    return figure


@matplotlib.rc_context(STYLE)
def shifts(frequencies: RotaryFrequencies) -> Picture:
    """The change of every pair's wavelength by rounding, and its upper bound.

    Args:
        frequencies: not rounded.
    """
    change, pairs = 100 * frequencies.angle_shift(), np.arange(len(frequencies.wavelengths))
    figure, (axis,) = figure_of(
        f"Change of each pair's wavelength by rounding: {change[0]:.1f} % for the first pair, below 0.1 % from pair "
        f"{np.flatnonzero(change >= 0.1)[-1] + 1} on; never more than half a token, the dashed line."
    )
    axis.plot(pairs, 50 / frequencies.wavelengths, "--", color=GREY, label="half a token", linewidth=1)
    axis.bar(pairs, change, color=BLUE, label="rounding")
    axis.set(yscale="log", xlabel="feature pair", ylabel="change of the wavelength, %")
    axis.legend(loc="upper right")
    return figure


@matplotlib.rc_context(STYLE)
def arcs(plain: RotaryFrequencies, scaled: RotaryFrequencies, train_length: int, test_length: int) -> Picture:
    """The factor by which a scaling stretches every pair, and the part of the circle that each pair covers.

    Args:
        plain, scaled: before and after.
        train_length, test_length: in tokens.
    """
    stretch = scaled.wavelengths / plain.wavelengths
    figure, (left, right) = figure_of(
        f"Left: YaRN's factor on each pair's wavelength, from 1 over a ramp to {stretch[-1]:g}. Right: the part of "
        f"its circle that each pair covers. In {test_length:,} tokens plain RoPE covers more than the {train_length:,} "
        "of training did, for all slow pairs; YaRN covers as much or less.",
        1, 2, (8.5, 3.2),
    )  # fmt: skip
    pairs = np.arange(len(plain.wavelengths))
    left.plot(pairs, stretch, **look("YaRN") | {"linewidth": 1, "markersize": 3.5})
    left.set(xlabel="feature pair", ylabel="wavelength, times that of RoPE")
    for name, frequencies, length, style, label in (
        ("RoPE", plain, test_length, "-", f"RoPE, {test_length:,} tokens"),
        ("YaRN", scaled, test_length, "-", f"YaRN, {test_length:,} tokens"),
        ("RoPE", plain, train_length, ":", f"in training, {train_length:,} tokens"),
    ):
        arc, color = np.minimum(length / frequencies.wavelengths, 1), "black" if style == ":" else look(name)["color"]
        width = 1.6 if style == ":" else 3
        right.plot(pairs, 100 * arc, style, color=color, label=label, linewidth=width)
    right.set(xlabel="feature pair", ylabel="part of the circle, %", ylim=(0, 104))
    right.legend(loc="lower left")
    return figure


@matplotlib.rc_context(STYLE)
def playground(base: float, head_dim: int, factor: float, trained: int, times: int) -> Picture:
    """Wavelengths and feature gap of chosen settings: the figure under the sliders.

    The gap is that of a model trained with plain RoPE, and of one trained with the rounded wavelengths.

    Args:
        base: `rope_theta`.
        head_dim: features of a head.
        factor: YaRN's; 1 for plain RoPE.
        trained: tokens seen in training.
        times: length of the text, in multiples of `trained`.
    """
    plain, length = default_frequencies(head_dim, base), times * trained
    scaled = plain if factor == 1 else yarn_frequencies(head_dim, base, factor, trained)
    rounded = scaled.resonate()
    measured = {
        "as computed": feature_gap(scaled, trained, length, plain),
        "rounded after training": feature_gap(rounded, trained, length, plain),
        "rounded before training": feature_gap(rounded, trained, length, rounded),
    }
    figure = _wavelengths_and_gaps(scaled, measured, trained, length)
    figure.alt = f"Left: wavelengths for the chosen settings. Right: {_gaps_in_words(measured)}"
    if factor != 1:
        pairs = np.arange(head_dim // 2)
        figure.axes[0].plot(pairs, plain.wavelengths, "--", color=GREY, linewidth=0.8, zorder=1)
    name = "RoPE" if factor == 1 else f"YaRN, factor {factor:g}"
    critical = rounded.critical_pairs(trained)
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
    lengths = inspection.train_length, inspection.test_length
    figure = _wavelengths_and_gaps(inspection.unrounded, inspection.gaps(), *lengths)
    figure.alt = (
        f"Left: wavelengths of {inspection.rope.rope_type} by pair, trained on {lengths[0]} tokens, read at "
        f"{lengths[1]}. Right: {_gaps_in_words(inspection.gaps())}"
    )
    figure.suptitle(
        f"{inspection.rope.rope_type}, base {inspection.rope.base:g}; trained angles: {inspection.training}", fontsize=9
    )
    return figure


@matplotlib.rc_context(STYLE)
def errors(positions: Sequence[int], measured: Mapping[str, Sequence[float]], bound: float, ylabel: str) -> Picture:
    """Errors over the position, both logarithmic, and the bound of one of them.

    Args:
        positions: in tokens.
        measured: by name, one number for each position.
        bound: of the last one.
        ylabel: of the errors.
    """
    words = (f"{name} grows from {values[0]:.1g} to {max(values):.1g}" for name, values in list(measured.items())[:-1])
    figure, (axis,) = figure_of(
        f"Errors over the position, both on logarithmic scales: {', '.join(words)}; {list(measured)[-1]} stays below "
        f"{bound:g} at every position."
    )
    for (name, values), color, style in zip(measured.items(), (ORANGE, BLUE), ("o--", "s-"), strict=True):
        axis.plot(positions, values, style, color=color, label=name, markersize=4, linewidth=1.4)
    axis.axhline(bound, color="black", linewidth=0.8, linestyle=":", label=f"bound {bound:g}".replace("e-0", "e-"))
    axis.set(xscale="log", yscale="log", xlabel="position", ylabel=ylabel, ylim=(2e-8, 8))
    axis.legend(loc="center left")
    return figure


def _wavelengths_and_gaps(
    frequencies: RotaryFrequencies, gaps: Mapping[str, Float64Array], train_length: int, test_length: int
) -> Picture:
    figure, (left, right) = figure_of("", 1, 2, (8.5, 3.4))
    _wavelengths(left, frequencies, train_length, test_length)
    gap_panel(right, gaps)
    return figure


def _gaps_in_words(gaps: Mapping[str, Float64Array]) -> str:
    """What `gap_panel` shows."""
    found = (
        f"{name}, {np.sum(gap == 0)} of {len(gap)} gaps are zero and the largest is {gap.max():.2g}"
        for name, gap in gaps.items()
    )
    return f"feature gap of each pair: {'; '.join(found)}."


def _wavelengths(axis: Axes, frequencies: RotaryFrequencies, train_length: int, test_length: int) -> None:
    pairs, values = np.arange(len(frequencies.wavelengths)), frequencies.wavelengths
    inside = values <= train_length
    axis.plot(pairs[inside], values[inside], "o", color=BLUE, markersize=4, label="turns fully in training")
    axis.plot(pairs[~inside], values[~inside], "^", color=ORANGE, markersize=4, label="does not")
    for length, name in ((train_length, "trained on"), (test_length, "read at")):
        axis.axhline(length, color=GREY, linewidth=0.8, linestyle="--")
        axis.text(0, length, f"{name} {length:,}", va="bottom", color=TEXT_GREY)
    axis.set(yscale="log", xlabel="feature pair", ylabel="wavelength, tokens per turn")
    axis.legend(loc="lower right")
