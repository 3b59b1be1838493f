"""Figures of notebook 3: memory, the progress of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_resonance.plots import BLUE, GREEN, GREY, ORANGE, STYLE

import matplotlib
import numpy as np

from .common import TEXT_GREY, Picture, figure_of

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
    parts = ", ".join(f"{name} {values[-1] / 1e6:.1f} MB" for name, values in planned.items())
    figure, (axis,) = figure_of(
        f"Memory over the context, up to {contexts[-1]} tokens: planned as lines, {parts} at the end; "
        f"{sum(map(len, measured.values()))} measured points, side by side where they would coincide."
    )
    apart = 0.015 * contexts[-1] * (np.arange(len(planned)) - (len(planned) - 1) / 2)
    for (name, values), (color, marker), aside in zip(planned.items(), FORMATS, apart, strict=False):
        axis.plot(contexts, np.array(values) / 1e6, "-", color=color, label=f"{name}, planned", linewidth=1.4)
        points = np.array(measured.get(name, ())) / 1e6
        axis.plot(aside + contexts[: len(points)], points, marker, color=color, label="measured", markersize=5)
    largest = max(max(values) for values in planned.values()) / 1e6
    axis.set(xlabel="context, tokens", ylabel="memory, MB", ylim=(0, 1.2 * largest), xlim=(0, 1.04 * contexts[-1]))
    axis.set_xticks([0, *contexts])
    axis.legend(loc="upper left", ncols=len(planned))
    return figure


@matplotlib.rc_context(STYLE)
def tokens_over_time(
    read: Sequence[tuple[float, int]], written: Sequence[tuple[float, int]], train_length: int
) -> Picture:
    """The progress of a text: tokens read, then tokens generated.

    Args:
        read, written: seconds since the start, and tokens in all, so far.
        train_length: tokens that the model was trained on.
    """
    seconds, tokens = (read + written)[-1]
    share = read[-1][0] / max(seconds, 1e-9)
    figure, (axis,) = figure_of(
        f"Tokens over the seconds: {read[-1][1]:,} are read and {len(written)} written in {seconds:.0f} s, "
        f"{100 * share:.0f} % of which is reading. The model was trained on {train_length:,}."
    )
    for points, color, marker, name in ((read, BLUE, "o-", "read"), (written, ORANGE, "^-", "written")):
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=color, label=name, markersize=4, linewidth=1.4)
    right = 1.02 * max(1.0, seconds)
    axis.set(xlabel="seconds", ylabel="tokens", xlim=(0, right), ylim=(0, 1.1 * max(tokens, 1)))
    if train_length < axis.get_ylim()[1]:
        axis.axhspan(0, train_length, color=GREY, alpha=0.15, linewidth=0)
        place = {"ha": "right", "va": "top", "color": TEXT_GREY}
        axis.text(0.99 * right, 0.9 * train_length, f"trained on {train_length:,}", **place)
    axis.legend(loc="upper left")
    return figure
