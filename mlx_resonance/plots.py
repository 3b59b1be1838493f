"""The figures that commands draw, and the style of all figures."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .errors import UsageError
from .files import user_path
from .frequencies import Float64Array
from .inspection import Inspection
from .rope_types import PREFIX
from .storage import atomic_file, check_output

# Okabe and Ito's colors, which the color-blind can tell apart: of what is no method.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
# A method has one hue and one marker in every figure: light with wavelengths as computed, dark where they are rounded.
METHODS = {
    "default": ("#A6A6A6", "black", "o"),
    "linear": ("#66C2A5", "#00664B", "v"),
    "ntk": ("#F4A582", "#A63603", "^"),
    "dynamic ntk": ("#E6C229", "#7A6000", "<"),
    "yarn": ("#56B4E9", "#004C82", "s"),
    "self-extend": ("#E78AC3", "#8E1F68", "D"),
    "dca": ("#A99BDB", "#473699", "P"),
    "dynamic": ("#C79A63", "#66390E", "X"),
}
ALIASES = {"rope": "default", "plain": "default", "plain rope": "default"}
RAMPS = ("#8FD3C9", "#0B6E66", "p")  # a second ramp of the same method, and whatever has no name above
LINES, MARKERS = ("-", "-", "--", ":", "-."), "ppd*h"  # of its third ramp, and the further ones
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def plot_inspection(inspection: Inspection, path: str | Path) -> None:
    """Plot three panels by pair index: wavelength, change by rounding, feature gap before and after rounding.

    The gap is the distance to the angles that the checkpoint was trained with.

    Args:
        inspection: from `inspect_rope`.
        path: as of `new_figure`.
    """
    pairs = np.arange(len(inspection.in_use.wavelengths))
    unrounded = inspection.unrounded
    lengths = inspection.train_length, inspection.test_length
    with new_figure(path, 7, 7) as figure:
        axes = figure.subplots(3, 1, sharex=True)
        _wavelengths(axes[0], pairs, inspection)
        axes[1].bar(pairs, 100 * unrounded.angle_shift(), color=GREY)
        axes[1].set(yscale="log", ylabel="change of wavelength\nby rounding, %")
        gap_panel(axes[2], inspection.gaps())
        figure.suptitle(
            f"{inspection.rope.rope_type}, base {inspection.rope.base:g}: "
            f"trained on {lengths[0]} tokens, read at {lengths[1]}\ntrained angles: {inspection.training}",
            fontsize=10,
        )


@contextlib.contextmanager
def new_figure(path: str | Path, width: float, height: float, style: Mapping[Any, Any] = STYLE) -> Iterator[Figure]:
    """Within it, a figure to draw on, without pyplot and its global state; it is written at the end.

    Args:
        path: the image to write; its suffix gives the format.
        width, height: in inches.
        style: matplotlib's settings.

    Raises:
        UsageError: matplotlib does not write that format.
    """
    path = image_path(path)
    with matplotlib.rc_context(dict(style)):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_file(path) as partial:
            figure.savefig(partial)


def plot_posgen(
    curves: Mapping[str, Mapping[str, np.ndarray]], kinds: Mapping[str, np.ndarray],
    faint: Mapping[str, Collection[str]], seed_length: int, train_length: int, path: str | Path,
) -> None:  # fmt: skip
    """Plot accuracy by position: a panel for the near and one for the far tokens of each subtask, a line per reading.

    Args:
        curves: from `accuracy_curves`.
        kinds: by subtask, from `Task.kinds`, of the same positions.
        faint: by subtask, readings to draw faintly: those that have not learned the task.
        seed_length: digits before the first predicted one.
        train_length: digits of a training row.
        path: as of `new_figure`.
    """
    panels = [(subtask, kind) for subtask in curves for kind in ("near", "far") if kind in kinds[subtask]]
    with new_figure(path, 1.5 + 2.4 * len(panels), 3.6) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (subtask, kind) in zip(axes, panels, strict=True):
            chosen = np.flatnonzero(kinds[subtask] == kind)
            accuracies = {name: accuracy[chosen] for name, accuracy in curves[subtask].items()}
            posgen_curves(axis, accuracies, 1 + seed_length + chosen, faint.get(subtask, ()))
            axis.axvline(train_length + 0.5, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=f"{subtask}, {kind} tokens", xlabel="position", ylim=(0, 103))
        axes[0].set_ylabel("accuracy, %")
        if any(faint.values()):
            figure.suptitle("faint: below 99 % within the training length", fontsize=9)
        legend_below(figure, min(5, 1 + len(panels)))


def posgen_curves(
    axis: Axes, accuracies: Mapping[str, np.ndarray], positions: np.ndarray, faint: Collection[str] = ()
) -> None:
    """Draw a line for every reading, with the `look` of its encoding.

    Args:
        axis: to draw on.
        accuracies: by name of the encoding, with the ramp where it has one; in [0, 1].
        positions: of the accuracies.
        faint: names of the lines to draw faintly.
    """
    for name, style in reading_looks(accuracies).items():
        style |= {"marker": "", "alpha": 0.3 if name in faint else 1}
        axis.plot(positions, 100 * accuracies[name], label=name, **style)


def reading_looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The `look` of every reading of PosGen, by name: that of its encoding, or of its ramp if that is not the first."""
    ramps: dict[str, list[str]] = {}  # by encoding
    result = {}
    for name in names:
        encoding, _, ramp = name.partition("/")
        known = ramps.setdefault(encoding.removeprefix(PREFIX), [])
        if ramp not in known:
            known.append(ramp)
        number = known.index(ramp)
        result[name] = look(name if number else encoding)
        if number > 1:  # the second has the colors of no method, which the others share
            result[name] |= {"linestyle": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}
    return result


def look(name: str) -> dict[str, Any]:
    """How a method is drawn in every figure: matplotlib's settings of a line with markers.

    Rounded wavelengths are a thin dark line over the light wide one of the same method, so that both can be seen where
    they coincide.

    Args:
        name: of a rope type, a position map or an encoding: `yarn`, `Resonance-YaRN`, `self-extend`.
    """
    base = re.sub("^resonance[-_ ]", "", name.lower())
    light, dark, marker = METHODS.get(ALIASES.get(base, base), RAMPS)
    if base == name.lower():
        return {"color": light, "marker": marker, "linewidth": 3, "markersize": 7, "zorder": 2}
    return {"color": dark, "marker": marker, "linewidth": 1.2, "markersize": 3.5, "zorder": 2.5}


def plot_passkey(lengths: Sequence[int], depths: Sequence[int], found: np.ndarray, path: str | Path) -> None:
    """Plot the fraction of passkeys found, by prompt length and depth.

    Args:
        lengths, depths: of the grid, in tokens and %.
        found: of `accuracy`, shape (depths, lengths), in [0, 1].
        path: as of `new_figure`.
    """
    width, height = 1.5 + 0.7 * max(len(lengths), 4), 1.5 + 0.45 * len(depths)
    with new_figure(path, width, height, STYLE | {"axes.grid": False}) as figure:
        axis = figure.subplots()
        image = axis.imshow(100 * found, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(found):
            color = "black" if value > 0.5 else "white"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        axis.set(xlabel="tokens", ylabel="depth of the key")
        figure.colorbar(image, label="found, %")


def plot_perplexity(
    contexts: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float] | np.ndarray]], path: str | Path
) -> None:
    """Plot perplexity by context, one line per rope.

    Args:
        contexts, panels: as of `perplexity_panels`.
        path: as of `new_figure`.
    """
    with new_figure(path, 6 if len(panels) == 1 else 3.2 * len(panels), 3.8) as figure:
        perplexity_panels(figure, contexts, panels)


def perplexity_panels(
    figure: Figure, contexts: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float] | np.ndarray]]
) -> None:
    """Panels of `perplexity_curves` by title, side by side; the contexts, in tokens, are in rising order."""
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        perplexity_curves(axis, contexts, curves)
        axis.set(title=title, xlabel="context, tokens")
    axes[0].set_ylabel("perplexity")
    longest = max(len(name) for curves in panels.values() for name in curves)
    legend_below(figure, 5 if longest < 20 else 1)  # names with a model are long


def perplexity_curves(axis: Axes, contexts: Sequence[int], curves: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """Draw a line for every rope, with the `look` of its method.

    Args:
        axis: to draw on.
        contexts: tokens, in rising order.
        curves: by name of the rope, after the model's if there are several; shape (contexts,), or (seeds, contexts) for
            a line of means with a band that spans the seeds.
    """
    seeds = {name: np.atleast_2d(np.asarray(values)) for name, values in curves.items()}
    styles = cycle(("-", "--", ":", "-."))  # of models
    models = {model: next(styles) for model in dict.fromkeys(_model_and_method(name)[0] for name in curves)}
    for name, values in seeds.items():
        model, method = _model_and_method(name)
        style = look(method)
        axis.plot(contexts, values.mean(0), models[model], label=name, **style)
        if len(values) > 1:
            axis.fill_between(contexts, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    length_axis(axis, contexts)
    every = np.concatenate([values.ravel() for values in seeds.values()])
    if every.max() > 5 * every.min():  # a scaling that breaks down would flatten the others
        axis.set_yscale("log")
        for formats in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formats(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))


def length_axis(axis: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis with a mark at each of some lengths, in tokens."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xticks([], minor=True)


def _model_and_method(name: str) -> tuple[str, str]:
    """The parts of `RopeConfig.name`, after the name of a model if there are several."""
    *before, last = name.split(", ")
    if ":" in last:  # a position map, after the rope type
        rope, method = before.pop() if before else "", last.partition(":")[0]
        return ", ".join(before), (PREFIX if rope.startswith(PREFIX) else "") + method
    return ", ".join(before), f"{last} NTK" if last.removeprefix(PREFIX) == "dynamic" else last


def gap_panel(axis: Axes, gaps: Mapping[str, Float64Array]) -> None:
    """The feature gap of every pair; two to four of them, by name."""
    looks = zip((ORANGE, BLUE, GREEN, GREY), ("^", "o", "s", "x"), (6, 2.5, 8, 5), strict=True)
    for (name, gap), (color, marker, size) in zip(gaps.items(), looks, strict=False):
        fill = "none" if marker == "s" else "full"  # where gaps coincide, all of them show
        axis.plot(np.arange(len(gap)), gap, marker, color=color, label=name, markersize=size, fillstyle=fill)
    axis.set_yscale("symlog", linthresh=1e-3)  # shows a gap of exactly zero
    axis.set(xlabel="feature pair", ylabel="feature gap", ylim=(-2e-4, 4))
    axis.set_yticks([0, 1e-3, 1e-2, 0.1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    axis.minorticks_off()
    axis.legend(loc="best")


def legend_below(figure: Figure, columns: int) -> None:
    """Draw one legend for all panels, with each name once."""
    found = [axis.get_legend_handles_labels() for axis in figure.axes]
    lines = {name: line for lines, names in found for line, name in zip(lines, names, strict=True)}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns)


def image_path(path: str | Path) -> Path:
    """A path that a figure can be written to. Raises as `check_output`, or if matplotlib cannot write its format."""
    path = user_path(path)
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in formats:
        raise UsageError(f"{path}: the suffix must be one of {', '.join(formats)}", option="plot")
    check_output(path, "plot")
    return path


def _wavelengths(axis: Axes, pairs: np.ndarray, inspection: Inspection) -> None:
    axis.plot(pairs, inspection.in_use.wavelengths, ".-", color=BLUE, markersize=4, linewidth=0.8)
    for length, name in ((inspection.train_length, "training"), (inspection.test_length, "test")):
        axis.axhline(length, color=GREY, linewidth=0.8, linestyle="--")
        axis.text(0, length, f" {name} length {length}", va="bottom", color=GREY)
    axis.set(yscale="log", ylabel="wavelength, tokens per turn")
