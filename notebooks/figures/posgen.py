"""Figures of notebook 4: PosGen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_resonance.plots import BLUE, GREY, ORANGE, STYLE, legend_below, look, posgen_curves

import matplotlib
import numpy as np
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .common import TEXT_GREY, Picture, figure_of


@matplotlib.rc_context(STYLE)
def sequences(rows: Mapping[str, NDArray[np.int32]], position: int, near: int, far: Mapping[str, int]) -> Picture:
    """PosGen's sequences as rows of cells; for one position, the digits from which its digit follows.

    Args:
        rows: digits by subtask, shape (tokens,) each.
        position: of the digit that is explained.
        near: number of digits just before it that count.
        far: by subtask, the position of the one further back.
    """
    length = max(map(len, rows.values()))
    places = ", ".join(f"{name} at position {place}" for name, place in far.items())
    figure, (axis,) = figure_of(
        f"The first {length} digits of {len(rows)} sequences. The digit at position {position} follows from the {near} "
        f"before it and from a far one: {places}.",
        size=(8.5, 0.5 + 0.62 * len(rows)),
    )
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
    """Loss and accuracy of a PosGen training so far.

    Args:
        steps: step, loss in nats, and the accuracy of the last validation (NaN before it), in [0, 1].
        chance: accuracy of guessing, in [0, 1].
        total: steps of the whole training.
    """
    step, loss, accuracy = np.array(steps, dtype=float).reshape(-1, 3).T
    measured = accuracy[~np.isnan(accuracy)]
    figure, (left, right) = figure_of(
        f"Training after {len(step)} of {total} steps. Left: the loss, {loss[-1]:.2f} nats where guessing has "
        f"{-np.log(chance):.2f}. Right: accuracy, {100 * measured[-1]:.0f} % where guessing has {100 * chance:.0f} %."
        if len(measured)
        else f"Training after {len(step)} of {total} steps: nothing validated yet.",
        1, 2, (7, 2.6),
    )  # fmt: skip
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
    """Accuracy over the position, a panel per subtask.

    Args:
        curves: by subtask and encoding, as `accuracy_curves` gives them.
        seed_length, train_length: digits.
    """
    words = "; ".join(
        f"{subtask}: " + ", ".join(f"{name} {100 * line[-20:].mean():.0f} %" for name, line in lines.items())
        for subtask, lines in curves.items()
    )
    alt = f"Accuracy over the position; trained on {train_length} digits (grey). Mean of the last 20 digits: {words}."
    figure, axes = figure_of(alt, 1, len(curves), (8.5, 3.2))
    for axis, (subtask, lines) in zip(axes, curves.items(), strict=True):
        # In semi-recursive sequences every other token is easy: two neighbours make one point.
        smooth = {name: np.convolve(accuracy, [0.5, 0.5], mode="valid") for name, accuracy in lines.items()}
        length = len(next(iter(smooth.values())))
        posgen_curves(axis, smooth, seed_length + 1.5 + np.arange(length))
        axis.axvspan(0, train_length + 0.5, color=GREY, alpha=0.15, linewidth=0)
        axis.set(title=subtask, xlabel="position", ylim=(0, 103), xlim=(0, None))
        if axis is not axes[0]:
            axis.tick_params(labelleft=False)
    axes[0].text(train_length / 2, 4, "trained", ha="center", color=TEXT_GREY)
    axes[0].set_ylabel("accuracy, %\n(mean of two neighbours)")
    legend_below(figure, 4)
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
    words = "; ".join(
        f"{subtask}: "
        + ", ".join(f"{name} {seeds.mean():.0f} % ({paper[subtask][name]:.0f})" for name, seeds in of.items())
        for subtask, of in ours.items()
    )
    alt = f"Accuracy past the training length, every seed and their mean; the paper's mean in parentheses. {words}."
    figure, axes = figure_of(alt, 1, len(ours), (8.5, 3.2))
    for axis, (subtask, encodings) in zip(axes, ours.items(), strict=True):
        for y, (encoding, seeds) in enumerate(encodings.items()):
            color = look(encoding)["color"]
            axis.plot(seeds, np.full(len(seeds), y), "o", color=color, markersize=4, label="one seed")
            axis.plot(seeds.mean(), y, "|", color=color, markersize=18, markeredgewidth=2.5, label="mean of them")
            axis.plot(paper[subtask][encoding], y, "D", color=ORANGE, markersize=5, label="the paper's mean")
        axis.set(title=subtask, xlabel="accuracy, %", xlim=(0, 103), ylim=(len(encodings) - 0.5, -0.5))
        axis.set_yticks(range(len(encodings)), list(encodings) if axis is axes[0] else [])
    legend_below(figure, 3)
    return figure


@matplotlib.rc_context(STYLE)
def differences(
    ours: Mapping[str, NDArray[np.float64]],
    intervals: Mapping[str, tuple[float, float]],
    paper: Mapping[str, float],
) -> Picture:
    """Resonance minus plain: every seed, the mean's interval, and the paper's difference.

    Args:
        ours: points of accuracy by name, one number for each seed.
        intervals: by name, their ends.
        paper: points by name.
    """
    words = ", ".join(f"{name} {seeds.mean():+.1f} (paper {paper[name]:+.1f})" for name, seeds in ours.items())
    figure, (axis,) = figure_of(
        f"Resonance minus plain, in points of accuracy, every seed, with 95 % intervals of the means: {words}.",
        size=(8.5, 0.9 + 0.42 * len(ours)),
    )
    for y, (name, seeds) in enumerate(ours.items()):
        axis.plot(intervals[name], (y, y), linewidth=3, color=BLUE, solid_capstyle="butt", label="95 %", zorder=1.5)
        axis.plot(seeds, np.full(len(seeds), y), "o", color="black", markersize=3, label="one seed")
        axis.plot(seeds.mean(), y, "|", color="black", markersize=16, markeredgewidth=2, label="mean of them")
        axis.plot(paper[name], y, "D", color=ORANGE, markersize=5, label="the paper's difference")
    axis.axvline(0, color="black", linewidth=0.8, zorder=0)
    axis.set(xlabel="resonance minus plain, points of accuracy past the training length", ylim=(len(ours) - 0.5, -0.5))
    axis.set_yticks(range(len(ours)), list(ours))
    legend_below(figure, 5)
    return figure
