"""An answer as markdown on a terminal, block by block while it is written."""

from __future__ import annotations

import re
import time
from typing import Any, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from .answer import CONTROL, Printer

REDRAW = 0.05  # seconds, at least, between two pictures of an unfinished block
SHARE = 10  # times the drawing of a picture, at least, between it and the next: a long table takes long to draw
FENCE = re.compile(r" {0,3}(```+|~~~+)")
ITEM = re.compile(r" {0,3}([-*+]|[0-9]{1,9}[.)])\s")
MAYBE_ITEM = re.compile(r"[-*+]|[0-9]{1,9}[.)]?")


def printer(out: TextIO) -> Printer | Rendered:
    """What prints an answer: markdown on a terminal with colours, or else plain text."""
    console = Console(file=out, highlight=False)
    plain = not console.is_terminal or console.is_dumb_terminal or console.no_color or console.color_system is None
    return Printer(out) if plain else Rendered(console)


class Rendered:
    """Prints markdown piece by piece: finished blocks stay, the end of the unfinished one is drawn anew."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._text, self._first, self._next = "", True, 0.0
        self._live: Live | None = None

    def write(self, text: str) -> None:
        """Print the next piece."""
        self._text += CONTROL.sub("", text.replace("\t", "    "))
        block, rest = first_block(self._text)
        while block:
            self._print(block)
            self._text = rest
            block, rest = first_block(rest)
        start = time.monotonic()
        if start >= self._next and self._text.strip():
            self._draw(_Block(self._text, self._first, self.console.height - 2))
            end = time.monotonic()
            self._next = end + max(REDRAW, SHARE * (end - start))

    def finish(self) -> None:
        """Print what is left."""
        self._print(self._text)
        self._text = ""

    def _draw(self, picture: _Block) -> None:
        if self._live is None:
            quiet: dict[str, Any] = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
            self._live = Live(picture, console=self.console, transient=True, **quiet)
            self._live.start(refresh=True)
        else:
            self._live.update(picture, refresh=True)

    def _print(self, block: str) -> None:
        """Print a block in place of its picture."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if block.strip():
            self.console.print(_Block(block, self._first))
            self._first = False


class Text(Markdown):
    """Rich's markdown, which loses nothing that a model writes: HTML is text, and lines stay lines."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code_theme="ansi_dark", hyperlinks=False)
        self.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
        for token in self.parsed:
            for child in token.children or ():
                child.type = "hardbreak" if child.type == "softbreak" else child.type


class _Block:
    """A block of markdown, after a blank line unless it is the first; only its last lines if there is a maximum."""

    def __init__(self, text: str, first: bool, most: int | None = None) -> None:
        self.text, self.first, self.most = Text(text), first, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.text, options, pad=False)
        blank = [not "".join(segment.text for segment in line).strip() for line in lines]
        begin, end = 0, len(lines)
        while begin < end and blank[begin]:  # Rich puts some around lists and code
            begin += 1
        while begin < end and blank[end - 1]:
            end -= 1
        lines = ([] if self.first else [[]]) + lines[begin:end]
        for line in lines if self.most is None else lines[-max(1, self.most) :]:
            yield from line
            yield Segment.line()


def first_block(text: str) -> tuple[str, str]:
    """Divide markdown before its second block: a line after a blank one, neither indented nor in a fence.

    Items of a list stay together.

    Returns:
        The first block, empty if it may not be finished, and the rest.
    """
    place, fence, blank, is_list = 0, "", False, None
    for line in text.splitlines(keepends=True):
        content = line.strip()
        if is_list is not None and blank and not fence and content and not line[0].isspace():
            if is_list and MAYBE_ITEM.fullmatch(line):
                return "", text
            if not (is_list and ITEM.match(line)):
                return text[:place], text[place:]
        if fence:
            closed = len(content) >= len(fence) and not content.strip(fence[0]) and line.endswith("\n")
            fence = "" if closed else fence
        elif opening := FENCE.match(line):
            fence = opening[1]
        blank = not content
        if is_list is None and content:
            is_list = ITEM.match(line) is not None
        place += len(line)
    return "", text
