"""The lines of a chat: commands and questions, whether they are typed or come from a pipe."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TextIO

from ..errors import FileInTheWayError, MissingFileError, UsageError
from ..files import user_path
from ..generation.conversation import ContextFullError, Conversation, Question
from ..generation.stream import Response
from ..sizes import format_size
from ..storage import atomic_file, check_output
from .answer import summary
from .errors import in_words
from .markdown import printer
from .output import stderr
from .prompts import STDIN, read_text
from .terminal import Interrupts, Lines, Reading, is_terminal, piped_lines, warnings_held

logger = logging.getLogger("mlx_resonance")

HELP = {
    "/file": "PATH   put a text before the next question",
    "/system": "[TEXT]   show the system prompt, or change it; - removes it",
    "/clear": "forget turns and files; the system prompt stays",
    "/save": "PATH   write the conversation as JSON",
    "/stats": "tokens, speeds, memory, KV cache",
    "/help": "this list",
}
ALONE = ("/clear", "/stats", "/help")  # nothing follows them


class Dialogue:
    """The lines that are read and what is done about them.

    Args:
        conversation: what the commands change.
        out: where answers go; everything else goes to stderr.
        invoked: the command, whose flags messages name.
        defaults: the sampling that comes from the checkpoint's generation_config.json.
    """

    def __init__(self, conversation: Conversation, out: TextIO, invoked: Any, defaults: dict[str, Any]) -> None:
        self.conversation, self.out, self.invoked, self.defaults = conversation, out, invoked, defaults
        self.terminal = is_terminal()
        self.interrupts = Interrupts()
        self.last: Response | None = None
        self.prompt = ""  # of the terminal

    def start(self, model: str, names: list[str], texts: list[str]) -> None:
        """Say what to expect, and read the files that were given.

        Args:
            model: its name.
            names, texts: of the files.
        """
        if not self.conversation.engine.tokenizer.has_chat_template:
            say(f"{model} has no chat template: questions and answers are joined by blank lines, as one text")
        say(self._rule())
        if self.terminal:
            say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        if texts:
            self._put(names[0] if len(names) == 1 else f"{len(names)} files", texts)
        self._refresh()

    def _refresh(self) -> None:
        self.prompt = f"{self._used()} > "

    def _rule(self) -> str:
        limit = self.conversation.engine.context
        if limit is None:
            return "the context has no limit"
        if self.conversation.overflow == "stop":
            rule = "no question is answered until /clear (--overflow drop-oldest drops the oldest turns instead)"
        else:
            rule = "the oldest turns are dropped; the system prompt and files stay"
        return f"when the context of {limit:,} tokens is full, {rule}"

    def run(self) -> None:
        """Handle lines until there are no more. On a terminal, an error is a line; elsewhere it ends the chat."""
        if not self.terminal:
            for line in piped_lines():
                self.handle(line)
            return
        with self.interrupts:
            for line in self._typed():
                self._attempt(self.handle, line)
                self._attempt(self._refresh)

    def _attempt(self, work: Callable[..., None], *arguments: str) -> None:
        try:
            with self.interrupts.working():
                work(*arguments)
        except Exception as error:  # whatever it is, the conversation is worth more than a traceback
            self._complain(error)
        except KeyboardInterrupt:
            say("stopped")

    def _typed(self) -> Iterator[str]:
        lines = Lines(HELP, self.out if self.out.isatty() else sys.stderr)
        while True:
            try:
                line = lines.read(self.prompt)
            except EOFError:
                return
            if line is None:
                say("Ctrl-D leaves")
            else:
                yield line

    def _complain(self, error: Exception) -> None:
        if isinstance(error, UsageError):
            line = in_words(error, self.invoked)
        else:
            line = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            logger.debug("a line of the chat failed", exc_info=error)
        if isinstance(error, RuntimeError):  # of MLX: what is in the KV cache may be unusable
            self.conversation.engine.clear()
        way = "; /clear forgets turns and files" if isinstance(error, ContextFullError) else ""
        say(f"error: {' '.join(line.split())}{way}")

    def handle(self, line: str) -> None:
        """Carry out a command, or answer a question; a blank line is neither.

        Raises:
            UsageError, OSError: it cannot be done; the conversation is as before, but for an answer that was begun.
        """
        if not line.strip():
            return
        if not line.startswith("/"):
            self.ask(line.strip())
            return
        name, rest = (*line.split(maxsplit=1), "")[:2]
        if name not in HELP:
            commands = ", ".join(HELP)
            raise UsageError(f"{name} is not a command, but {commands} are; a question may begin with a space")
        if name in ALONE and rest:
            raise UsageError(f"nothing may follow {name}")
        try:
            getattr(self, name[1:])(rest.strip())
        except UsageError as error:
            error.option = None  # the command is what was given, no flag
            raise

    def ask(self, text: str) -> None:
        """Answer a question. After Ctrl-C the turn has what was written till then; if nothing was, there is no turn."""
        question = self.conversation.prepare(text)
        self._say_dropped(question.dropped)
        reading, printed, last, stopped = Reading("prompt", self.interrupts), printer(self.out), None, False
        with ExitStack() as stack:
            stack.enter_context(warnings_held())
            answer = stack.enter_context(closing(self.conversation.answer(question, reading)))  # type: ignore[type-var]
            try:
                with reading:
                    for last in answer:
                        reading.stop()
                        printed.write(last.text)
                        if stopped := self.interrupts.asked:
                            break
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                stopped = True
            finally:
                if last is not None:
                    printed.finish()
        self._say_end(question, last, stopped)

    def _say_end(self, question: Question, last: Response | None, stopped: bool) -> None:
        if last is None:
            say("stopped: the question is dropped, what was read of it stays in the cache")
            return
        parts = [summary(last, self.defaults)]
        self.last, self.defaults = last, {}  # said once
        if last.finish_reason == "length":
            parts.append("the context is full" if question.fills else f"cut at {question.new:,} tokens")
        elif stopped and last.finish_reason is None:
            parts.append("stopped: the conversation keeps what was written")
        if not self.terminal:
            parts.append(f"{self._used()} of context used")
        say("; ".join(parts))
        if self.terminal:
            say("")

    def _used(self) -> str:
        used, limit = len(self.conversation.beginning), self.conversation.engine.context
        return f"{used:,} tokens" if limit is None else f"{used:,} of {limit:,} tokens"

    def _say_dropped(self, turns: int) -> None:
        if turns:
            say(f"the context is full: dropped {_count(turns, 'turn')}, from the oldest on")

    def _put(self, name: str, texts: Sequence[str]) -> None:
        with Reading(f"reading {name}", self.interrupts) as reading:
            dropped = self.conversation.put(*texts, progress=reading)
        self._say_dropped(dropped)
        say(f"{name}: read, before the next question")

    def file(self, rest: str) -> None:
        """`/file PATH`: read a text now; after Ctrl-C it is not part of the conversation."""
        path = path_of(rest, "/file")
        if path == STDIN:
            raise UsageError("questions come from standard input: /file needs a file")
        try:
            self._put(str(path), [read_text(path)])
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            say(f"stopped: {path} is not part of the conversation")

    def system(self, rest: str) -> None:
        """`/system [TEXT]`."""
        if rest:
            self._say_dropped(self.conversation.set_system_prompt(None if rest == "-" else rest))
            say("changed: the conversation is read anew with the next question")
        else:
            say(self.conversation.system_prompt or "no system prompt")

    def clear(self, rest: str) -> None:
        """`/clear`."""
        self.conversation.clear()
        say("forgot turns and files" + ("; the system prompt stays" if self.conversation.system_prompt else ""))

    def save(self, rest: str) -> None:
        """`/save PATH`: messages with role and content, as JSON; no file is overwritten."""
        path = path_of(rest, "/save")
        if not self.conversation.turns:
            raise UsageError("there is nothing to save yet")
        check_output(path)
        if not path.parent.is_dir():
            raise MissingFileError(f"{path.parent}: no such folder")
        if path.exists():
            raise FileInTheWayError(f"{path} exists: choose another name")
        messages = [dict(message) for message in self.conversation.messages]
        with atomic_file(path) as partial:
            partial.write_text(json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n", "utf-8")
        say(f"wrote {path}: {len(messages)} messages")

    def stats(self, rest: str) -> None:
        """`/stats`."""
        conversation, disk = self.conversation, self.conversation.engine.disk_cache
        files = len(conversation.files) + sum(len(turn.files) for turn in conversation.turns)
        say(f"context: {self._used()}, {_count(len(conversation.turns), 'turn')}, {_count(files, 'file')}")
        if self.last is not None:
            say(f"last answer: {summary(self.last, {})}")
        say(f"KV cache in memory: {len(conversation.engine.tokens):,} tokens")
        if disk is None:
            say("KV cache on disk: none")
        else:
            size = sum(path.stat().st_size for path in disk.folder.glob("*.safetensors"))
            say(f"KV cache on disk: {format_size(size)} of {format_size(disk.max_bytes)} in {disk.folder}")

    def help(self, rest: str) -> None:
        """`/help`."""
        for name, what in HELP.items():
            say(f"{name} {what}")
        say("Alt-Enter starts another line, Ctrl-C stops an answer, Ctrl-D leaves")


def say(line: str) -> None:
    """Print a line on stderr."""
    stderr.print(line, style="dim", emoji=False, soft_wrap=not stderr.is_terminal)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def path_of(text: str, command: str) -> Path:
    """The path after a command; it may be quoted as in a shell. Raises UsageError if there is none."""
    if not text:
        raise UsageError(f"{command} needs a path")
    if "\0" in text:
        raise UsageError("no path has a NUL character in it")
    if (path := user_path(text)).exists():
        return path
    try:
        (word,) = shlex.split(text)
    except ValueError:  # several words, or a quote that does not end: a name with spaces
        return path
    return user_path(word)
