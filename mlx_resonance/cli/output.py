"""Where commands write: tables and progress on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Task as ProgressTask
from rich.text import Text

from ..errors import ANOTHER, UsageError
from ..storage import check_output, full_disk

# A path with brackets is not markup.
stdout = Console(highlight=False, markup=False)
stderr = Console(stderr=True, highlight=False, markup=False)


def print_json(value: dict[str, Any]) -> None:
    """Print one object on one line."""
    print(json.dumps(value, allow_nan=False), flush=True)


def check_outputs(output: Path | None = None, plot: Path | None = None, option: str = "output") -> None:
    """Refuse now, not after hours, a result (of an option) or a figure that cannot be written."""
    if output is not None:
        check_output(output, option)
    if plot is not None:
        from ..plots import image_path

        image_path(plot)
    check_apart(output, plot)


def check_apart(results: Path | None, plot: Path | None) -> None:
    """Refuse a figure that would overwrite the results."""
    if results is not None and plot is not None and results.resolve() == plot.resolve():
        raise UsageError(f"{plot} is the file of the results, too", remedies=[{"plot": ANOTHER}])


def draw(plot: Callable[..., None], *data: Any, path: Path) -> None:
    """Write a figure."""
    with full_disk(path):
        plot(*data, path=path)
    stderr.print(f"wrote {path}", soft_wrap=True)


class TokensPerSecond(ProgressColumn):
    """The speed of a task that counts tokens."""

    def render(self, task: ProgressTask) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


def progress_bar() -> Progress:
    """A bar on stderr, if that is a terminal: tokens, tokens/s, time left; it disappears when done."""
    count = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns = (*count, TokensPerSecond(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def count_bar() -> Progress:
    """A bar like `progress_bar`, for things without a speed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def bytes_bar() -> Progress:
    """A bar like `progress_bar`, with bytes and bytes per second."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True, disable=not stderr.is_terminal)
