"""A conversation with a model: system prompt, files, turns, and what happens when the context is full."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Remedy, UsageError, check_option
from ..scaling import check_context, larger_context
from .engine import Engine
from .messages import Message, chat_tokens, question_messages
from .prefill import Progress
from .prompt_cache import common_prefix
from .sampling import Sampling
from .stop import StopStrings
from .stream import Response

OVERFLOWS = ("stop", "drop-oldest")
ANSWER = 256  # tokens that an answer must have room for; less in a context of less than 8 times that
LONGEST_ANSWER = 4096  # tokens, where the context has no limit


class ContextFullError(UsageError):
    """A question or a text does not fit into what the conversation leaves of the context."""


@dataclass(frozen=True)
class Turn:
    """A question with the files that were put before it, and its answer."""

    files: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A question that fits into the context.

    Args:
        text: what was asked.
        tokens: the whole prompt.
        new: maximum number of tokens to generate.
        fills: whether these are all that the context has room for.
        dropped: number of turns, from the oldest on, that are not in the prompt any more.
    """

    text: str
    tokens: list[int]
    new: int
    fills: bool
    dropped: int


class Conversation:
    """Turns of one conversation, which an engine answers.

    A file is put before the next question, in the same message. When the context is full, `stop` refuses the question
    and changes nothing. `drop-oldest` drops whole turns, from the oldest on, until half of the room that turns have is
    free: what follows a dropped turn has to be read anew, and this way that is rare. System prompt and files stay: the
    files of a dropped turn move to the beginning of the first one that is left.

    Args:
        engine: it should have no other texts to write: it keeps one KV cache.
        system_prompt: text of the system message.
        overflow: `stop` or `drop-oldest`.
        max_tokens: maximum number of tokens of an answer; None for what the context has room for.
        sampling, stop: as in `Engine.stream`.

    Raises:
        UsageError: an option is out of range, or the system prompt does not fit, or has no place.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system_prompt: str | None = None,
        overflow: str = "stop",
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        check_option("overflow", overflow in OVERFLOWS, f"one of {', '.join(OVERFLOWS)}", overflow)
        check_option("max_tokens", max_tokens is None or max_tokens >= 1, "at least 1", max_tokens)
        self.engine, self.overflow, self.max_tokens = engine, overflow, max_tokens
        self.sampling, self.stop = sampling or Sampling(), StopStrings(stop).stop
        self.sampling.check(engine.vocabulary)
        self.system_prompt: str | None = None
        self.turns: list[Turn] = []
        self.files: list[str] = []  # for the next question
        self._begun: tuple[Any, list[int]] | None = None  # what `_tokens` returned last without a question, and of what
        if system_prompt is not None:
            self.set_system_prompt(system_prompt)

    @property
    def messages(self) -> list[Message]:
        """The turns so far, after the system prompt."""
        return _messages(self.turns, self.system_prompt)

    @property
    def beginning(self) -> list[int]:
        """The tokens that any next question's prompt begins with; they are what is used of the context."""
        return self._tokens(self.system_prompt, 0, self.files, None)

    def set_system_prompt(self, text: str | None) -> int:
        """Change the system prompt, None for none. Returns the number of turns dropped; raises like `put`."""
        _, dropped = self._fit(text, self.files, None)
        self.system_prompt = text
        self._drop(dropped)
        return dropped

    def check(self, *texts: str) -> None:
        """Raise as `put` does where the texts of files do not fit. Nothing is read."""
        self._fit(self.system_prompt, [*self.files, *texts], None)

    def put(self, *texts: str, progress: Progress | None = None) -> int:
        """Put the texts of files before the next question, and read them. After any exception there is no trace of it.

        Args:
            texts: one for each file.
            progress: called with the number of tokens read and their total.

        Returns:
            The number of turns dropped to make room for them.

        Raises:
            ContextFullError: they do not fit; remedies are an overflow rule or a factor that would help.
        """
        before = self.turns, self.files
        try:
            _, dropped = self._fit(self.system_prompt, [*self.files, *texts], None)
            self._drop(dropped)
            self.files = [*self.files, *texts]
            if tokens := self.beginning:
                self.engine.read(tokens, progress)
        except BaseException:
            self.turns, self.files = before
            raise
        return dropped

    def clear(self) -> None:
        """Forget turns and files."""
        self.turns, self.files = [], []

    def prepare(self, question: str) -> Question:
        """Check that a question fits into the context. Nothing changes before its answer begins.

        Raises:
            ContextFullError: it does not, as in `put`.
            UsageError: it is empty, or the chat template fails.
        """
        if not question.strip():
            raise UsageError("the question is empty", option="prompt")
        tokens, dropped = self._fit(self.system_prompt, self.files, question)
        limit, most = self.engine.context, self.max_tokens
        room = LONGEST_ANSWER if limit is None else limit - len(tokens)
        fills = limit is not None and (most is None or most >= room)
        new = room if fills or most is None else most
        return Question(question, tokens, new, fills, dropped)

    def answer(self, question: Question, progress: Progress | None = None) -> Iterator[Response]:
        """Write the answer to a question that was prepared.

        The turn is added when the iterator ends, or is closed, with what was written till then; without a single token
        there is no turn.

        Args:
            question: from `prepare`, with no change to the conversation since.
            progress: called with the number of prompt tokens done and their total.
        """
        pieces: list[str] = []
        options = {"sampling": self.sampling, "stop": self.stop, "progress": progress}
        responses = self.engine.stream(question.tokens, question.new, **options)  # type: ignore[arg-type]
        try:
            with closing(responses):  # type: ignore[type-var]  # a generator
                for response in responses:
                    pieces.append(response.text)
                    yield response
        finally:
            if pieces:
                self._drop(question.dropped)
                self.turns.append(Turn(tuple(self.files), question.text, "".join(pieces)))
                self.files = []

    def _fit(self, system: str | None, files: Sequence[str], question: str | None) -> tuple[list[int], int]:
        """The tokens of a prompt that leaves room for an answer, and how many turns must be dropped for that."""
        limit, turns = self.engine.context, len(self.turns)

        def tokens(dropped: int) -> list[int]:
            return self._tokens(system, dropped, files, question)

        whole = tokens(0)
        if limit is None or len(whole) + (room := self._room(limit)) <= limit:
            return whole, 0
        fewest = len(tokens(turns))
        if fewest + room > limit or self.overflow == "stop":
            remedies: list[Remedy] = [{"overflow": "drop-oldest"}] if fewest + room <= limit else []
            raise self._full(len(whole) if self.overflow == "stop" else fewest, room, limit, remedies)

        def needed(most: int) -> int:
            return bisect_left(range(turns), True, key=lambda dropped: len(tokens(dropped)) <= most)

        half = min(needed((fewest + limit - room) // 2), turns - 1)
        dropped = max(needed(limit - room), half)
        return tokens(dropped), dropped

    def _room(self, limit: int) -> int:
        return max(1, min(ANSWER, limit // 8, self.max_tokens or ANSWER))

    def _full(self, tokens: int, room: int, limit: int, remedies: list[Remedy]) -> ContextFullError:
        if limit == self.engine.rope.context_length:
            try:
                check_context(self.engine.rope, tokens + room)
            except UsageError as error:
                remedies = [*remedies, *error.remedies]
        remedies = [*remedies, *larger_context(self.engine.rope, limit, tokens + room)]
        message = f"{tokens:,} tokens of conversation and {room:,} for an answer exceed the context of {limit:,}"
        return ContextFullError(message, remedies=remedies)

    def _tokens(self, system: str | None, dropped: int, files: Sequence[str], question: str | None) -> list[int]:
        """The prompt of a question; without one, the tokens that the prompts of any two have in common."""
        turns, moved = without_oldest(self.turns, files, dropped)
        if question is None:
            what = system, turns, moved
            if self._begun is None or self._begun[0] != what:
                one, other = (self._tokens(system, dropped, files, text) for text in ("A", "7 b"))
                self._begun = what, one[: common_prefix(one, other)]
            return self._begun[1]
        return chat_tokens(self.engine.tokenizer, [*_messages(turns, system), *question_messages(moved, question)])

    def _drop(self, turns: int) -> None:
        self.turns, self.files = without_oldest(self.turns, self.files, turns)


def without_oldest(turns: Sequence[Turn], files: Sequence[str], dropped: int) -> tuple[list[Turn], list[str]]:
    """Drop the oldest turns. Their files move to the beginning of the first turn that is left, or of the next one's."""
    moved = [file for turn in turns[:dropped] for file in turn.files]
    if not (kept := list(turns[dropped:])):
        return [], [*moved, *files]
    kept[0] = replace(kept[0], files=(*moved, *kept[0].files))
    return kept, list(files)


def _messages(turns: Sequence[Turn], system: str | None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += question_messages(turn.files, turn.question)
        messages.append({"role": "assistant", "content": turn.answer})
    return messages
