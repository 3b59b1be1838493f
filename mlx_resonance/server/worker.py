"""The queue, and the loop that writes one answer after another on the thread that owns the engine."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.sample_utils import make_logits_processors

from ..errors import DeviceError, UsageError
from ..generation.engine import Engine
from ..generation.sampling import Sampling
from .errors import Refusal
from .logprobs import logprob_of
from .responses import TokenLogprob

logger = logging.getLogger("mlx_resonance.server")


@dataclass(frozen=True)
class Piece:
    """The next token of the answer to a prompt, on which no MLX array hangs."""

    index: int  # of the prompt
    text: str
    finish_reason: Any
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    logprob: TokenLogprob | None


@dataclass(eq=False)
class Work:
    """A request that was found right, on its way through the queue.

    Args:
        prompts: token ids of each.
        max_tokens: of each answer; None for what the context has room for, and at most `most`.
        sampling, stop: of the engine.
        penalties: arguments of mlx-lm's `make_logits_processors`.
        alternatives: likeliest tokens to report beside each token; None for no log-probabilities.
        tell: called on the engine's thread with each piece or an error; at the end with None.
        cancelled: set by anyone to end it within a token.
    """

    prompts: list[list[int]]
    max_tokens: int | None
    sampling: Sampling
    tell: Callable[[Piece | Exception | None], None]
    stop: list[str] = field(default_factory=list)
    penalties: dict[str, Any] = field(default_factory=dict)
    alternatives: int | None = None
    most: int | None = None
    cancelled: bool = False

    def new(self, prompt: int, context: int | None) -> int | None:
        """Maximum tokens of the answer to a prompt of that many; None for what the context has room for."""
        if self.max_tokens is not None or self.most is None or context is None:
            return self.max_tokens if self.max_tokens is not None else self.most
        return max(1, min(self.most, context - prompt))  # a prompt without room is refused as such


class _Cancelled(Exception):
    """Ends the reading of a prompt."""


class Worker:
    """Answers requests in the order in which they come; `run` is its loop.

    Args:
        engine: used by the thread that calls `run`, and by no other while it runs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._running: Work | None = None
        self._stopped = False

    def submit(self, work: Work) -> None:
        """Append a request to the queue; after `stop` it is told that there will be no answer."""
        with self._changed:
            if not self._stopped:
                self._waiting.append(work)
                self._changed.notify()
                return
        _tell_off(work)

    def withdraw(self, work: Work) -> None:
        """End a request within a token; one that still waits leaves the queue."""
        work.cancelled = True
        with self._changed:
            if work not in self._waiting:
                return
            self._waiting.remove(work)
        work.tell(None)

    def stop(self) -> None:
        """End the loop within a token, or a chunk of a prompt; every client that waits is told at once."""
        with self._changed:
            self._stopped, left = True, list(self._waiting)
            left += [] if self._running is None else [self._running]
            self._waiting.clear()
            self._changed.notify()
        for work in left:
            _tell_off(work)

    def run(self) -> None:
        """Answer requests until `stop`, or an exception that is not an `Exception`."""
        try:
            while (work := self._next()) is not None:
                self._answer(work)
        finally:
            self.stop()

    def _next(self) -> Work | None:
        with self._changed:
            self._running = None
            while not (self._waiting or self._stopped):
                self._changed.wait()
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _answer(self, work: Work) -> None:
        try:
            for index, prompt in enumerate(work.prompts):
                self._write(index, prompt, work)
        except _Cancelled:
            pass
        except UsageError as error:
            if isinstance(error, DeviceError):  # the client cannot help it
                logger.error(f"error: {error}")
            work.tell(error)
        except Exception as error:
            logger.exception("an answer could not be written")
            work.tell(error)
            self.engine.clear()
        except BaseException:
            _tell_off(work)
            raise
        finally:
            work.tell(None)

    def _write(self, index: int, prompt: list[int], work: Work) -> None:
        def check(*_: Any) -> None:
            if work.cancelled:
                raise _Cancelled

        check()
        answer = self.engine.stream(
            prompt,
            work.new(len(prompt), self.engine.context),
            sampling=work.sampling,
            stop=work.stop,
            logits_processors=make_logits_processors(**work.penalties),
            progress=check,
        )
        ends = self.engine.tokenizer.eos_token_ids
        with closing(answer):  # type: ignore[type-var]  # a generator
            for response in answer:
                logprob = None
                if work.alternatives is not None and not (response.finish_reason and response.token in ends):
                    logprob = logprob_of(self.engine.tokenizer, response, work.alternatives)
                counts = response.prompt_tokens, response.cached_tokens, response.generation_tokens
                work.tell(Piece(index, response.text, response.finish_reason, *counts, logprob))
                check()


def _tell_off(work: Work) -> None:
    work.cancelled = True  # pieces that come later are not sent
    work.tell(Refusal(503, "the server stops"))
    work.tell(None)
