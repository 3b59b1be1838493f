"""Figures of notebook 3: memory, the progress of a text, the time to the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_resonance.plots import BLUE, GREEN, GREY, ORANGE, STYLE

import matplotlib
import numpy as np

from .common import TEXT_GREY, Picture, bare_names, figure_of

FORMATS = ((BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (GREY, "D"))  # of the first, second … series


@matplotlib.rc_context(STYLE)
def memory_over_context(
    contexts: Sequence[int], planned: Mapping[str, Sequence[int]], measured: Mapping[str, Sequence[int]]
) -> Picture:
    """Memory over the context: planned as lines, measured as points, which may arrive one by one.

    Args:
        contexts: tokens, in rising order.
        planned: bytes by KV format, one number for each context.
        measured: the same, so far.
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
        planned: bytes by KV format, one number for each context.
        most: tokens that fit, by format.
        limit: bytes of memory.
    """
    figure, (axis,) = figure_of()
    for (name, values), (color, marker) in zip(planned.items(), FORMATS, strict=False):
        label = f"{name}: {most[name]:,} tokens"
        axis.plot(contexts, np.array(values) / 1e9, "-", color=color, linewidth=1.4)
        axis.plot(most[name], limit / 1e9, marker, color=color, label=label, markersize=7, clip_on=False)
    axis.axhline(limit / 1e9, color="black", linewidth=0.8, linestyle=":")
    axis.text(contexts[0], limit / 1e9, f"limit: {limit / 1e9:.1f} GB", va="bottom", color=TEXT_GREY)
    axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="memory, GB")
    axis.legend(loc="center left")
    return figure


@matplotlib.rc_context(STYLE)
def tokens_over_time(
    read: Sequence[tuple[float, int]], written: Sequence[tuple[float, int]], train_length: int, length: int
) -> Picture:
    """The progress of a text: tokens read, then tokens generated.

    Args:
        read, written: seconds since the start, and tokens in all, so far.
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
def first_tokens(seconds: Mapping[str, Sequence[float]]) -> Picture:
    """Seconds to the first token of each question, as groups of bars.

    Args:
        seconds: by name, in the order of the questions, so far.
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
    bare_names(axis)
    figure.legend(loc="outside upper right", ncols=len(seconds))
    return figure
