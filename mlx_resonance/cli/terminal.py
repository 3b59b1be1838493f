"""What a chat needs of a terminal, or of a pipe: lines with history, Ctrl-C as a request, a bar while it reads."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import termios
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from platformdirs import user_data_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter, PathCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.utils import is_dumb_terminal
from rich.progress import TaskID

from ..errors import UsageError
from ..storage import atomic_file
from .output import progress_bar

LONGEST_HISTORY = 10_000  # lines of the file
LONGEST_LINE = 2**28  # bytes of a question from a pipe
NOTICEABLE = 512  # tokens to read that are worth a progress bar

logger = logging.getLogger("mlx_resonance")


class History(FileHistory):
    """Lines of earlier chats in a file that only its owner can read; without the file there is just no history."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def load_history_strings(self) -> Iterable[str]:
        """The lines, the newest first."""
        try:
            self._shorten()
            return list(super().load_history_strings())
        except OSError:
            return []

    def _shorten(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        if len(lines) > LONGEST_HISTORY:
            kept = lines[-LONGEST_HISTORY:]
            begin = next((place for place, line in enumerate(kept) if line.startswith(b"#")), 0)  # a whole entry
            with atomic_file(self.path) as partial:
                partial.touch(0o600)
                partial.write_bytes(b"".join(kept[begin:]))

    def store_string(self, string: str) -> None:
        """Append a line."""
        with contextlib.suppress(OSError, UnicodeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.fchmod(file, 0o600)  # it may be an older one
            finally:
                os.close(file)
            super().store_string(string)


class Lines:
    """Reads lines with editing, history and completion of commands. Enter ends a line, Alt-Enter starts another one.

    Args:
        commands: those that Tab completes; `/file` and `/save` are followed by a path.
        out: the terminal.
    """

    def __init__(self, commands: Iterable[str], out: TextIO) -> None:
        paths = PathCompleter(expanduser=True)
        keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            history=History(user_data_path("mlx-resonance") / "chat-history"),
            completer=NestedCompleter({name: paths if name in ("/file", "/save") else None for name in commands}),
            complete_while_typing=False,
            key_bindings=keys,
            multiline=True,
            output=None if is_dumb_terminal() else create_output(out),
        )

    def read(self, prompt: str) -> str | None:
        """Ask for a line; None after Ctrl-C in an empty one. Raises EOFError after Ctrl-D."""
        while True:
            try:
                return self._session.prompt(prompt)
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    return None


class Interrupts:
    """As a context: Ctrl-C is noted in `asked`, for a clean end of what is done; pressed twice, it ends at once."""

    def __init__(self) -> None:
        self.asked = self._at_work = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around work that Ctrl-C ends. What is typed meanwhile is not shown, since it would stand in the text."""
        self.asked, self._at_work = False, True
        try:
            with _no_echo():
                yield
        finally:
            self._at_work = False

    def _note(self, _: int, __: FrameType | None) -> None:
        if self.asked and self._at_work:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    no_terminal = contextlib.suppress(termios.error, OSError, ValueError)
    before = None
    try:
        with no_terminal:
            before = termios.tcgetattr(sys.stdin)
            quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        yield
    finally:
        with no_terminal:
            if before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Reading:
    """As a context: called with the prompt tokens done and their total, it shows a bar if there are many to read.

    Args:
        what: the words before the bar.
        interrupts: after a chunk, KeyboardInterrupt is raised if they ask for it.
    """

    def __init__(self, what: str, interrupts: Interrupts) -> None:
        self.what, self.interrupts = what, interrupts
        self._bar = progress_bar()
        self._task: TaskID | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show the progress."""
        if self.interrupts.asked:
            raise KeyboardInterrupt
        if self._task is None and total - done >= NOTICEABLE:
            self._bar.start()
            self._task = self._bar.add_task(self.what, completed=done, total=total)
        elif self._task is not None:
            self._bar.update(self._task, completed=done)

    def stop(self) -> None:
        """Remove the bar, if there is one: text follows."""
        if self._task is not None:  # or else Rich prints an empty line where it cannot draw
            self._bar.stop()
            self._task = None


@contextlib.contextmanager
def warnings_held() -> Iterator[None]:
    """Keep the library's warnings back until the end: they would stand in the middle of an answer."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)


def is_terminal() -> bool:
    """Whether a person types on standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def piped_lines() -> Iterator[str]:
    """The lines of standard input. Raises UsageError if one is too long, or not UTF-8."""
    while sys.stdin is not None and (line := sys.stdin.buffer.readline(LONGEST_LINE + 1)):
        if len(line) > LONGEST_LINE:
            raise UsageError(f"a question has more than {LONGEST_LINE} bytes")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text: {error}") from None
