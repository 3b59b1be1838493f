"""Results and figures of notebook 5: methods past the window."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_resonance.plots import STYLE, look

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from .common import TEXT_GREY, Picture, figure_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
REFERENCE = "resonance_yarn"
AROUND = 0.22  # part of the reference's perplexity that a panel shows to both sides
Report = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by method and length, as of past_the_window.py


def extension(name: str) -> tuple[list[int], list[dict[str, Any]]]:
    """What `benchmarks/extension.py` found: the contexts, in tokens, and a record for every model."""
    header, *models = map(json.loads, (RESULTS / f"extension-{name}.jsonl").read_text().splitlines())
    return header["contexts"], models


def past_the_window(name: str) -> tuple[list[int], Report] | None:
    """What `benchmarks/past_the_window.py` found, by its own report: lengths in tokens, and figures of each method.

    Args:
        name: of the checkpoint.

    Returns:
        None if there are no results yet.
    """
    path = RESULTS / f"past-the-window-{name}.jsonl"
    if not path.exists():
        return None
    sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other
    try:
        from past_the_window import report
    finally:
        sys.path.remove(str(BENCHMARKS))
    _, *rows = map(json.loads, path.read_text().splitlines())
    found = report(rows, sorted({row["length"] for row in rows}))
    # A run in progress may not have come to all lengths.
    lengths = sorted(int(length) for length, cell in found.get(REFERENCE, {}).items() if "perplexity" in cell)
    return (lengths, found) if lengths else None


@matplotlib.rc_context(STYLE)
def methods_past_the_window(lengths: Sequence[int], report: Report) -> Picture:
    """Perplexity of every method in a row of its own, a panel for each length, with 95 % intervals.

    The intervals are of the difference to Resonance-YaRN, over texts; its own perplexity is the line.

    Args:
        lengths: tokens.
        report: of `past_the_window`.
    """
    methods = [method for method in report if any("perplexity" in cell for cell in report[method].values())]
    cells = {method: report[method].get(str(lengths[-1]), {}) for method in methods}
    last = {method: cell["perplexity"] for method, cell in cells.items() if "perplexity" in cell}
    words = ", ".join(f"{method} {value:.1f}" for method, value in sorted(last.items(), key=lambda item: item[1]))
    figure, axes = figure_of(
        f"Perplexity of {len(methods)} methods at {', '.join(f'{length:,}' for length in lengths)} tokens, each in a "
        f"row. At {lengths[-1]:,}: {words}.",
        1, len(lengths), (2.4 * len(lengths) + 1.2, 0.9 + 0.27 * len(methods)),
    )  # fmt: skip
    for axis, length in zip(axes, map(str, lengths), strict=True):
        reference = report[REFERENCE][length]["perplexity"]
        low, high = (1 - AROUND) * reference, (1 + AROUND) * reference
        axis.axvline(reference, color=look(REFERENCE)["color"], linewidth=0.8, zorder=1)
        for y, method in enumerate(methods):
            cell = report[method].get(length, {})
            style = look(method) | {"markersize": 7}
            if cell.get("perplexity", 0) > high:  # an arrow, and the number
                text = f"{cell['perplexity']:.1f} →"
                axis.text(high, y, text, ha="right", va="center", color=TEXT_GREY)
            elif "perplexity" in cell:
                axis.plot(cell["perplexity"], y, **style)
                ends = cell.get("to_resonance_yarn", (0, 0, 0))[1:]
                bar = [np.clip(reference * (1 + end / 100), low, high) for end in ends]
                axis.plot(bar, (y, y), color=style["color"], linewidth=2, zorder=1.5)
        axis.set(
            title=f"{int(length):,} tokens", xlabel="perplexity", xlim=(low, high), ylim=(len(methods) - 0.5, -0.5)
        )
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_yticks(range(len(methods)), methods if axis is axes[0] else [""] * len(methods))
    return figure


@matplotlib.rc_context(STYLE)
def keys_past_the_window(lengths: Sequence[int], report: Report) -> Picture:
    """The part of hidden keys that every method finds, as a table in colors.

    Args:
        lengths: tokens.
        report: of `past_the_window`.
    """
    methods = [method for method in report if any("keys" in cell for cell in report[method].values())]
    cells = [[report[method].get(str(length), {}) for length in lengths] for method in methods]
    found = np.array([[cell["found"] / cell["keys"] if "keys" in cell else np.nan for cell in row] for row in cells])
    words = "; ".join(
        f"{method} {', '.join('none' if value == 0 else f'{100 * value:.0f} %' for value in row[~np.isnan(row)])}"
        for method, row in zip(methods, found, strict=True)
    )
    figure, (axis,) = figure_of(
        f"Hidden keys found at {', '.join(f'{length:,}' for length in lengths)} tokens: {words}.",
        size=(1.8 + 0.9 * len(lengths), 0.8 + 0.32 * len(methods)),
    )
    axis.imshow(100 * found, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(found):
        if not np.isnan(value):
            color = "black" if value > 0.5 else "white"
            axis.text(x, y, f"{cells[y][x]['found']} of {cells[y][x]['keys']}", ha="center", va="center", color=color)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(methods)), methods)
    axis.set(xlabel="tokens of the text")
    axis.grid(False)
    axis.tick_params(length=0)
    return figure
