"""How the scripts here end: ratios, a Markdown table, or one line for a user's mistake."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

from mlx_resonance.errors import UsageError


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(x / y for x, y in zip(ours, others, strict=True)), 3)


def exit_with(main: Callable[[], None]) -> None:
    """Run a script's main function; a user's mistake is one line on stderr, and exit code 2."""
    try:
        main()
    except UsageError as error:
        print("error:", " ".join(error.message.split()), file=sys.stderr)
        sys.exit(2)


def on_progress(label: str, done: int, total: int) -> None:
    """Report the tokens read, on stderr."""
    print(f"{label}: {done:,} of {total:,} tokens", file=sys.stderr, flush=True)
