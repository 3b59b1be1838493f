"""The figures of notebooks 3 and 4, in the style of `plots`; each function returns a figure for a cell to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .notebook_figures import Picture, figure_of
from .plots import BLUE, GREEN, GREY, ORANGE, STYLE

TEXT_GREY = "#555555"  # dark enough for letters
LIGHT_BLUE = "#8CBFDE"
FORMATS = ((BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (GREY, "D"))  # of the first, second … series
ENCODING_COLORS = {"rope": GREY, "linear": GREEN, "ntk": ORANGE, "yarn": BLUE}


@matplotlib.rc_context(STYLE)
def memory_over_context(
    contexts: Sequence[int], planned: Mapping[str, Sequence[int]], measured: Mapping[str, Sequence[int]]
) -> Picture:
    """Memory over the context: planned as lines, measured as points, which may come one after the other.

    Args:
        contexts: tokens, in rising order.
        planned: bytes by format of the keys and values, one number for each context.
        measured: the same, as many as there are so far.
    """
    figure, (axis,) = figure_of()
    for (name, values), (color, marker) in zip(planned.items(), FORMATS, strict=False):
        axis.plot(contexts, np.array(values) / 1e6, "-", color=color, label=f"{name}, planned", linewidth=1.4)
        points = np.array(measured.get(name, ())) / 1e6
        axis.plot(contexts[: len(points)], points, marker, color=color, label="measured", markersize=5)
    largest = max(max(values) for values in planned.values()) / 1e6
    axis.set(xlabel="context, tokens", ylabel="memory, MB", ylim=(0, 1.2 * largest), xlim=(0, 1.04 * contexts[-1]))
    axis.set_xticks([0, *contexts])
    axis.legend(loc="upper left", ncols=len(planned))
    return figure


@matplotlib.rc_context(STYLE)
def what_fits(
    contexts: Sequence[int], planned: Mapping[str, Sequence[int]], most: Mapping[str, int], limit: int
) -> Picture:
    """The plan over very long contexts, and the largest one that fits.

    Args:
        contexts: tokens, in rising order.
        planned: bytes by format of the keys and values, one number for each context.
        most: tokens that fit, by format.
        limit: bytes that there are.
    """
    figure, (axis,) = figure_of()
    for (name, values), (color, marker) in zip(planned.items(), FORMATS, strict=False):
        label = f"{name}: {most[name]:,} tokens"
        axis.plot(contexts, np.array(values) / 1e9, "-", color=color, linewidth=1.4)
        axis.plot(most[name], limit / 1e9, marker, color=color, label=label, markersize=7, clip_on=False)
    axis.axhline(limit / 1e9, color="black", linewidth=0.8, linestyle=":")
    axis.text(contexts[0], limit / 1e9, f"there are {limit / 1e9:.1f} GB", va="bottom", color=TEXT_GREY)
    axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="memory, GB")
    axis.legend(loc="center left")
    return figure


@matplotlib.rc_context(STYLE)
def tokens_over_time(
    read: Sequence[tuple[float, int]], written: Sequence[tuple[float, int]], train_length: int, length: int
) -> Picture:
    """How far a text has come: tokens that were read, then tokens that were written.

    Args:
        read, written: seconds since the start, and tokens in all; as many as there are so far.
        train_length, length: tokens that the model was trained on, and of the whole text.
    """
    figure, (axis,) = figure_of()
    for points, color, marker, name in ((read, BLUE, "o-", "read"), (written, ORANGE, "^-", "written")):
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=color, label=name, markersize=4, linewidth=1.4)
    seconds = max([1.0, *(second for second, _ in (*read, *written))])
    axis.axhspan(0, train_length, color=GREY, alpha=0.15, linewidth=0)
    axis.text(0.99 * seconds, train_length / 2, f"trained on {train_length}", ha="right", va="center", color=TEXT_GREY)
    axis.set(xlabel="seconds", ylabel="tokens", xlim=(0, 1.02 * seconds), ylim=(0, 1.05 * length))
    axis.set_yticks(np.linspace(0, length, 5).round().astype(int))
    if read:
        axis.legend(loc="upper left")
    return figure


@matplotlib.rc_context(STYLE)
def loss_over_position(losses: Mapping[str, NDArray[np.floating]], train_length: int, window: int) -> Picture:
    """The loss over the position, a running mean; the trained length is marked.

    Args:
        losses: nats per token by name, shape (tokens,) each.
        train_length: tokens.
        window: positions that a point is the mean of.
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
        _bare_names(axis)
    return figure


@matplotlib.rc_context(STYLE)
def first_tokens(seconds: Mapping[str, Sequence[float]]) -> Picture:
    """Seconds to the first token of one question after the other, a group of bars for each.

    Args:
        seconds: by name, in the order of the questions; as many as there are so far.
    """
    figure, (axis,) = figure_of(size=(7, 2.8))
    width = 0.8 / len(seconds)
    for i, ((name, values), color) in enumerate(zip(seconds.items(), (GREY, BLUE, ORANGE, GREEN), strict=False)):
        places = np.arange(len(values)) + (i - (len(seconds) - 1) / 2) * width
        drawn = axis.bar(places, values, width, color=color, label=name)
        axis.bar_label(drawn, [f"{value:.2g}" for value in values], padding=2)
    questions = max(map(len, seconds.values()))
    axis.set_xticks(range(questions), [f"question {i + 1}" for i in range(questions)])
    axis.set_ylabel("seconds to the first token")
    axis.margins(y=0.15)
    _bare_names(axis)
    figure.legend(loc="outside upper right", ncols=len(seconds))
    return figure


@matplotlib.rc_context(STYLE)
def sequences(rows: Mapping[str, NDArray[np.int32]], position: int, near: int, far: Mapping[str, int]) -> Picture:
    """PosGen's sequences as rows of cells; at one position, the digits that the digit there follows from.

    Args:
        rows: digits by subtask, shape (tokens,) each.
        position: whose digit is explained.
        near: how many digits just before it count.
        far: by subtask, the position of the one further back.
    """
    length = max(map(len, rows.values()))
    figure, (axis,) = figure_of(size=(8.5, 0.5 + 0.62 * len(rows)))
    for y, (name, digits) in enumerate(rows.items()):
        for x, digit in enumerate(digits):
            is_near, is_far = position - near <= x < position, x == far[name]
            color = BLUE if is_near else ORANGE if is_far else "black" if x == position else "#EEEEEE"
            axis.add_patch(Rectangle((x - 0.46, y - 0.36), 0.92, 0.72, color=color, linewidth=0))
            letters = "black" if color == "#EEEEEE" else "white"
            axis.text(x, y, str(digit), ha="center", va="center", color=letters, fontsize=8)
    axis.set(xlim=(-0.6, length - 0.4), ylim=(len(rows) - 0.5, -0.5), xlabel="position")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xticks(range(0, length, 4))
    axis.tick_params(length=0)
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)
    squares = [Patch(color=color) for color in (BLUE, ORANGE, "black")]
    figure.legend(squares, ["near digits", "far digit", "what they give"], loc="outside upper right", ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def training(steps: Sequence[tuple[int, float, float]], chance: float, total: int) -> Picture:
    """A PosGen training: loss and accuracy, as far as it has come.

    Args:
        steps: step, loss in nats, and the accuracy of the last validation (NaN before it), in [0, 1].
        chance: accuracy of guessing, in [0, 1].
        total: steps of the whole training.
    """
    figure, (left, right) = figure_of(1, 2, (7, 2.6))
    step, loss, accuracy = np.array(steps, dtype=float).reshape(-1, 3).T
    left.plot(step, loss, "o-", color=BLUE, markersize=4, linewidth=1.4)
    left.axhline(-np.log(chance), color="black", linewidth=0.8, linestyle=":", label="guessing")
    right.plot(step, 100 * accuracy, "o-", color=BLUE, markersize=4, linewidth=1.4)
    right.axhline(100 * chance, color="black", linewidth=0.8, linestyle=":", label="guessing")
    left.set(xlabel="step", ylabel="loss, nats per token", xlim=(0, total + 0.5), ylim=(0, None))
    right.set(xlabel="step", ylabel="accuracy, %", xlim=(0, total + 0.5), ylim=(0, 103))
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_over_position(
    curves: Mapping[str, Mapping[str, NDArray[np.float64]]], seed_length: int, train_length: int
) -> Picture:
    """Accuracy over the position, a panel per subtask; resonance is solid, its plain twin dashed in the same colour.

    Args:
        curves: by subtask and encoding, as `accuracy_curves` gives them.
        seed_length, train_length: digits.
    """
    figure, axes = figure_of(1, len(curves), (8.5, 3.2))
    for axis, (subtask, lines) in zip(axes, curves.items(), strict=True):
        for encoding, accuracy in lines.items():
            base = encoding.removeprefix("resonance_")
            # In semi-recursive sequences every other token is easy: two neighbours make one point.
            smooth = 100 * np.convolve(accuracy, [0.5, 0.5], mode="valid")
            positions = seed_length + np.arange(len(smooth)) + 1.5
            style = "--" if base == encoding else "-"
            axis.plot(positions, smooth, style, color=ENCODING_COLORS[base], label=encoding, linewidth=1.3)
        axis.axvspan(0, train_length + 0.5, color=GREY, alpha=0.15, linewidth=0)
        axis.set(title=subtask, xlabel="position", ylim=(0, 103), xlim=(0, None))
        if axis is not axes[0]:
            axis.tick_params(labelleft=False)
    axes[0].text(train_length / 2, 4, "trained", ha="center", color=TEXT_GREY)
    axes[0].set_ylabel("accuracy, %\n(mean of two neighbours)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@matplotlib.rc_context(STYLE)
def seeds_and_paper(
    ours: Mapping[str, Mapping[str, NDArray[np.float64]]], paper: Mapping[str, Mapping[str, float]]
) -> Picture:
    """Accuracy past the training length: every seed, their mean, and the paper's mean.

    Args:
        ours: % by subtask and encoding, one number for each seed.
        paper: % by subtask and encoding.
    """
    figure, axes = figure_of(1, len(ours), (8.5, 3.2))
    for axis, (subtask, encodings) in zip(axes, ours.items(), strict=True):
        for y, (encoding, seeds) in enumerate(encodings.items()):
            axis.plot(seeds, np.full(len(seeds), y), "o", color=LIGHT_BLUE, markersize=4, label="one seed")
            axis.plot(seeds.mean(), y, "|", color=BLUE, markersize=18, markeredgewidth=2.5, label="mean of them")
            axis.plot(paper[subtask][encoding], y, "D", color=ORANGE, markersize=5, label="the paper's mean")
        axis.set(title=subtask, xlabel="accuracy, %", xlim=(0, 103), ylim=(len(encodings) - 0.5, -0.5))
        axis.set_yticks(range(len(encodings)), list(encodings) if axis is axes[0] else [])
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def differences(
    ours: Mapping[str, NDArray[np.float64]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    paper: Mapping[str, float],
) -> Picture:
    """Resonance minus plain: every seed, two intervals of the mean, and the paper's difference.

    Args:
        ours: points of accuracy by name, one number for each seed.
        intervals: by kind, the narrow one first, then by name: their ends.
        paper: points by name.
    """
    figure, (axis,) = figure_of(size=(8.5, 0.9 + 0.42 * len(ours)))
    for y, (name, seeds) in enumerate(ours.items()):
        for (kind, ends), width, color in zip(intervals.items(), (9, 2.5), (LIGHT_BLUE, BLUE), strict=True):
            axis.plot(ends[name], (y, y), linewidth=width, color=color, solid_capstyle="butt", label=kind, zorder=1.5)
        axis.plot(seeds, np.full(len(seeds), y), "o", color="black", markersize=3, label="one seed")
        axis.plot(seeds.mean(), y, "|", color="black", markersize=16, markeredgewidth=2, label="mean of them")
        axis.plot(paper[name], y, "D", color=ORANGE, markersize=5, label="the paper's difference")
    axis.axvline(0, color="black", linewidth=0.8, zorder=0)
    axis.set(xlabel="resonance minus plain, points of accuracy past the training length", ylim=(len(ours) - 0.5, -0.5))
    axis.set_yticks(range(len(ours)), list(ours))
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5)
    return figure


def _bare_names(axis: Axes) -> None:
    axis.grid(False, axis="x")
    axis.tick_params(axis="x", length=0)
