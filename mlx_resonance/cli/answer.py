"""An answer on stdout: byte for byte into a pipe or a file, wrapped at words on a terminal."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any, TextIO

from rich.cells import cell_len

from ..generation import figures
from ..generation.stream import Response
from ..sizes import format_size

# What a model writes must not move the cursor or change a terminal's settings.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
PIECES = re.compile(r"\n|[^\S\n]+|\S+")


class Printer:
    """Prints a text piece by piece.

    Args:
        out: where to; None for stdout.
        width: columns of a terminal; None to ask it. 0 prints the text as it is, as happens where there is none.
    """

    def __init__(self, out: TextIO | None = None, width: int | None = None) -> None:
        self.out = out or sys.stdout
        terminal = self.out.isatty() if width is None else width > 0
        self.width = (width or shutil.get_terminal_size().columns) if terminal else 0
        self._column, self._space, self._word = 0, "", ""

    def write(self, text: str) -> None:
        """Print the next piece; on a terminal its last word waits until it is known to be whole."""
        if not self.width:
            self.out.write(text)
        else:
            text, self._word = self._word + CONTROL.sub("", text.replace("\t", "    ")), ""
            for part in PIECES.findall(text):
                self._add(part)
        self.out.flush()

    def _add(self, part: str) -> None:
        if part == "\n":
            self._word_done()
            self.out.write("\n")
            self._column, self._space = 0, ""
        elif part.isspace():
            self._word_done()
            self._space += part
        else:
            self._word_done()
            self._word = part

    def _word_done(self) -> None:
        """Print the word that waits, on the next line if this one has no room for it."""
        if not self._word:
            return
        length = cell_len(self._word)
        if self._column + len(self._space) + length > self.width:
            self.out.write(("\n" if self._column else "") + self._word)
            self._column = length
        else:
            self.out.write(self._space + self._word)
            self._column += len(self._space) + length
        self._column = (self._column - 1) % self.width + 1  # a longer word is broken by the terminal
        self._space = self._word = ""

    def finish(self) -> None:
        """Print what waits, and end the line."""
        self._word_done()
        self.out.write("\n")
        self.out.flush()


def speed(tokens_per_second: float) -> str:
    """A speed in words, with a digit after the point where that says more."""
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 10 else 1}f} tokens/s"


def summary(last: Response, defaults: dict[str, Any]) -> str:
    """The line after an answer.

    Args:
        last: the last response.
        defaults: the sampling that comes from the checkpoint's generation_config.json.
    """
    total, cached = last.prompt_tokens, last.cached_tokens
    if cached:
        prompt = f"{cached:,} of {total:,} prompt tokens from the cache"
        prompt += f", {total - cached:,} read" + (f" at {speed(last.prompt_tps)}" if total - cached > 1 else "")
    else:
        prompt = f"prompt {total:,} tokens, {speed(last.prompt_tps)}"
    parts = [prompt, f"generated {last.generation_tokens:,} tokens, {speed(last.generation_tps)}"]
    parts.append(f"peak memory {format_size(1e9 * last.peak_memory)}")
    if defaults:
        parts.append(in_words(defaults))
    return "; ".join(parts)


def in_words(defaults: dict[str, Any]) -> str:
    """The sampling that comes from a checkpoint, in words."""
    values = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
    return f"{values} from generation_config.json"


def result(text: str, last: Response, defaults: dict[str, Any], cached: bool) -> dict[str, Any]:
    """The object of `generate --json`: `figures`, with `cached_tokens` if there is an on-disk cache to take them from.

    Args:
        text: the whole text.
        last, defaults: as of `summary`.
        cached: whether there is such a cache.
    """
    more = {"cached_tokens": last.cached_tokens} if cached else {}
    return figures(text, last) | more | ({"sampling_defaults": defaults} if defaults else {})
