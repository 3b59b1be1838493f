"""The rows of a batch: mlx-lm's BatchGenerator, given one prompt at a time, in chunks of bounded time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .._mlx_lm import BatchGenerator, generation_stream
from ..attention import Inference
from ..errors import DeviceError
from .batch_cache import beginning, row_caches, shareable
from .beginnings import SHARED
from .engine import Engine
from .prefill import PREFILL_BATCH, Pace, device_errors
from .prompt_cache import common_prefix
from .sampling import Sampling
from .stop import StopStrings
from .text import AnswerText, text_of

if TYPE_CHECKING:
    from .batch import Request


@dataclass
class Row:
    """A prompt and its answer in progress.

    Args:
        request: the prompt.
        known: how many of its tokens came from a cache.
        stops, text: look for stop strings.
        read: how many tokens of the prompt were read, the known ones included.
        answering: whether all were.
        tokens: the answer so far.
    """

    request: Request
    known: int
    stops: StopStrings
    text: AnswerText
    read: int = 0
    answering: bool = False
    tokens: list[int] = field(default_factory=list)

    @property
    def unread(self) -> int:
        """Tokens to read before the last one, which the first token of the answer is generated from."""
        return 0 if self.answering else len(self.request.tokens) - 1 - self.read


class Batch:
    """Texts that are read and written at once.

    mlx-lm decides what happens to which row; this decides when a row enters, with which caches, and how many tokens of
    every prompt are read next.

    Args:
        engine: reads the beginnings that rows share.
        sampling, stop, max_tokens: for every answer.
        size: maximum number of rows.
    """

    def __init__(self, engine: Engine, sampling: Sampling, stop: Sequence[str], max_tokens: int, size: int) -> None:
        self.engine, self.sampling, self.stop, self.max_tokens, self.size = engine, sampling, stop, max_tokens, size
        self.rows: dict[int, Row] = {}
        self.step_size = engine.pace.step
        readers = min(PREFILL_BATCH, size)
        # It counts the tokens of all rows: the time of a chunk depends on their sum.
        self.pace = Pace(len(engine.model.layers), self.step_size * readers, agree=engine.pace.agree)
        self.shares = shareable(row_caches(engine.model, engine.kv_format))
        self.generator = BatchGenerator(
            Inference(engine.model),
            stop_tokens=[[token] for token in engine.tokenizer.eos_token_ids],
            sampler=sampling.sampler(),
            completion_batch_size=size,
            prefill_batch_size=readers,
            prefill_step_size=self.step_size,
        )

    def has_room(self) -> bool:
        """Whether mlx-lm would take another row at once; rows that wait would hold memory."""
        reading = sum(not row.answering for row in self.rows.values())
        return len(self.rows) < self.size and reading < min(PREFILL_BATCH, self.size)

    def insert(self, request: Request, shared: int, last: bool = False) -> None:
        """Add a row.

        Args:
            request: the prompt.
            shared: how many tokens its neighbours share with it, from `by_beginning`.
            last: no other prompt follows.
        """
        engine, tokens = self.engine, request.tokens
        with mx.stream(generation_stream):
            caches, known = self._begin(tokens, shared if self.shares else 0)
        if last or not shared:
            engine.clear()
        [uid] = self.generator.insert(
            [tokens[known:]],
            [self.max_tokens],
            caches=[caches],
            all_tokens=[tokens[:known]],
            logits_processors=[self.sampling.processors()],
        )
        stops = StopStrings(self.stop)
        self.rows[uid] = Row(request, known, stops, AnswerText(engine.tokenizer), read=known)

    def _begin(self, tokens: list[int], shared: int) -> tuple[list[Any], int]:
        """Caches with a prompt's first tokens, and how many these are."""
        engine = self.engine
        known = common_prefix(engine.tokens, tokens[:shared])
        if shared - known >= SHARED:
            engine.read(tokens[: shared + 1])
            known = shared
        if known:
            return beginning(engine.cache, known), known
        caches = row_caches(engine.model, engine.kv_format)
        return caches, 0 if engine.disk_cache is None else engine.disk_cache.fetch(tokens, caches)

    def step(self) -> Iterator[dict[str, Any]]:
        """Read the next chunk of the prompts, and generate the next token of the answers. Yields finished answers."""
        read, generated = self._next()
        disk_cache = self.engine.disk_cache
        for progress in read:
            row = self.rows[progress.uid]
            row.read, row.answering = row.known + progress.progress[0], progress.end_of_prompt
            if row.answering and disk_cache is not None:
                caches, _ = self.generator.extract_cache([progress.uid])[progress.uid]
                disk_cache.store(row.request.tokens, caches)
        for response in generated:
            if (reason := self._add(response)) is not None:
                yield self._answer(self.rows.pop(response.uid), reason)

    def _next(self) -> tuple[list[Any], list[Any]]:
        """The generator's step: what it read and what it generated."""
        reading = [row for row in self.rows.values() if row.unread > 0]
        if not reading:
            with device_errors():
                return self.generator.next()
        done = max(row.read for row in reading)
        size = max(1, min(self.step_size, self.pace.size(done) // len(reading)))
        self.generator.prefill_step_size = size
        longest = min(size, max(row.unread for row in reading))  # shorter rows are padded
        try:
            with self.pace.reading(longest * len(reading), done):
                return self.generator.next()
        except DeviceError as error:
            raise DeviceError(
                error.message, option=error.option, remedies=[{"prefill_step_size": max(1, longest // 2)}]
            ) from error

    def _add(self, response: Any) -> str | None:
        """Append a token to its answer. Returns why the answer ends, if it does."""
        row, reason = self.rows[response.uid], response.finish_reason
        if reason == "stop":
            return "stop"
        row.tokens.append(response.token)
        if self.stop:
            row.stops.add(row.text.add(response.token))
            if row.stops.found and reason is None:
                self.generator.remove([response.uid])
                return "stop"
        return str(reason) if reason is not None else None

    def _answer(self, row: Row, reason: str) -> dict[str, Any]:
        """What `generate_batch` returns for a row."""
        stops = StopStrings(self.stop)
        text = stops.add(text_of(self.engine.tokenizer, row.tokens))
        return {
            "id": row.request.id,
            "text": text if stops.found else text + stops.finish(),
            "prompt_tokens": len(row.request.tokens),
            "generation_tokens": len(row.tokens),
            "finish_reason": "stop" if stops.found else reason,
        }
