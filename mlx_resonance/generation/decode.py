"""Writing an answer token by token, or several per pass of the model where a proposal says how it may continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._mlx_lm import generation_stream
from ..attention import Inference
from ..rope import expect
from ..rope_config import RopeConfig
from .sampling import LogitsProcessor, Sampler
from .speculation import Proposals

CLEARED = 256  # tokens after which MLX's unused buffers are released, as in mlx-lm


def decode(
    model: nn.Module,
    cache: list[Any],
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor] = (),
    proposals: Proposals | None = None,
    stream: mx.Stream | mx.ThreadLocalStream = generation_stream,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[tuple[int, mx.array], None, None]:
    """Generate tokens: what mlx-lm's `generate_step` yields, in fewer passes of the model where proposals are right.

    A pass computes the logits after the last token and after each proposed one. In order, the logits processors and
    the sampler are applied to them; a proposed token is accepted if and only if it is the one that the sampler draws
    there. The accepted tokens and the first one drawn otherwise are emitted, and the caches trimmed to match.

    The text is that of plain decoding, token for token, with sampling too: there is one draw per token, from the same
    random numbers, and those drawn after a rejected token are drawn again. Logits of passes of different lengths differ
    by rounding, which a quantized KV cache amplifies, so that a token may differ where two are about equally likely, or
    where one is at the edge of those that are sampled from. Samplers and logits processors must be functions of their
    arguments and of MLX's random numbers: they see tokens that are rejected later.

    Without proposals, while they pause, and where there is none, each pass starts before the last token is known, as in
    mlx-lm. Where there may be one, the next pass waits for that token. Nothing is proposed to caches that cannot be
    trimmed, nor in a pass whose tokens would rotate otherwise than one by one.

    When the iterator ends, the caches hold all of its tokens, as mlx-lm's do; where it is closed, at most those that it
    has yielded. It draws one token more than it yields, as mlx-lm's loop does.

    Args:
        model: from `load`.
        cache: one per layer; they hold the prompt but for its last token.
        prompt_tokens: the prompt.
        max_tokens: number of tokens to generate, at least 1.
        sampler: makes a token (1,) of log-probabilities (1, vocabulary).
        logits_processors: functions of the tokens so far and the logits, which return new logits.
        proposals: decides what is proposed; None for plain decoding.
        stream: of MLX, to compute on.
        clock: seconds, like `time.perf_counter`: the times of passes decide how much is proposed.

    Yields:
        A token and the log-probabilities (vocabulary,) that it was drawn from.
    """
    passes = _Passes(model, cache, list(prompt_tokens), sampler, list(logits_processors), stream)
    proposals = proposals if passes.can_trim() else None
    seen, count, since = passes.offset + 1, 0, clock()
    try:
        flight = passes.start(_ids(prompt_tokens[-1:]))
        while True:
            ahead = None
            if not flight.proposed and not (proposals is not None and proposals.awaits()):
                ahead = passes.start(flight.drawn)
            tokens = passes.finish(flight)
            count += len(tokens)
            now = clock()
            if proposals is not None:
                proposals.passed(len(flight.proposed), tokens, now - since)
            since = now
            if ahead is None:
                with mx.stream(stream):  # a draft model computes
                    proposed = [] if proposals is None else proposals.propose(max_tokens - count - 1)
                ahead = passes.start(_ids(tokens[-1:]), passes.alike(proposed))
            for token, logprobs in zip(tokens, flight.logprobs, strict=False):
                seen += 1
                left = clock()
                yield token, logprobs
                since += clock() - left
            if count >= max_tokens:
                return
            if count // CLEARED > (count - len(tokens)) // CLEARED:
                mx.clear_cache()
            flight = ahead
    finally:
        passes.trim(seen)


def same_angles(rope: RopeConfig, first: int, last: int) -> bool:
    """Whether texts of `first` and of `last` tokens rotate alike."""
    return not rope.depends_on_length or rope.frequencies(first) == rope.frequencies(last)


def _ids(tokens: Sequence[int]) -> mx.array:
    return mx.array(list(tokens), mx.uint32)


@dataclass
class _Pass:
    """A pass of the model that has been started.

    Args:
        drawn: the tokens (L,) that the sampler draws after the last token and each proposed one.
        logprobs: L arrays (vocabulary,).
        proposed: the tokens that it checks, L - 1.
        keys: MLX's random state (L, 2) after each draw, if anything is proposed.
    """

    drawn: mx.array
    logprobs: list[mx.array]
    proposed: list[int] = field(default_factory=list)
    keys: mx.array | None = None


class _Passes:
    """Starts and finishes passes of a model over one text."""

    def __init__(
        self,
        model: nn.Module,
        cache: list[Any],
        prompt: list[int],
        sampler: Sampler,
        processors: list[LogitsProcessor],
        stream: mx.Stream | mx.ThreadLocalStream,
    ) -> None:
        self.model, self.cache, self.sampler, self.processors = Inference(model), cache, sampler, processors
        self.stream, self.rope = stream, model.args.rope
        self.prompt = self.offset + 1  # tokens: they decide angles that change with the length
        self.text = _ids(prompt[:-1]) if processors else None  # what the caches hold of this prompt

    @property
    def offset(self) -> int:
        return int(self.cache[0].offset)

    def can_trim(self) -> bool:
        """Whether the caches lose nothing by taking tokens and being trimmed."""
        return all(getattr(layer, "max_size", None) is None and layer.is_trimmable() for layer in self.cache)

    def trim(self, most: int) -> None:
        """Trim the caches to at most this many tokens; after an interrupt some layers may have counted one more."""
        held = min(most, *(layer.offset for layer in self.cache))
        for layer in self.cache:
            if layer.offset > held:
                layer.trim(layer.offset - held)

    def alike(self, proposed: list[int]) -> list[int]:
        """The proposed tokens, if a pass over them rotates each one as passes of one token would; otherwise none."""
        held = max(self.prompt, self.offset)
        return proposed if same_angles(self.rope, held, max(held, self.offset + 1 + len(proposed))) else []

    def start(self, last: mx.array, proposed: Sequence[int] = ()) -> _Pass:
        """Start a pass over the last token (1,), whose value need not be known, and the proposed ones."""
        model = self.model.of
        if self.rope.depends_on_length and model.model.rope.expected_length != self.prompt:
            expect(model, self.prompt)  # another text was read or written since the last pass
        with mx.stream(self.stream):
            inputs = mx.concatenate([last, _ids(proposed)]) if proposed else last
            logits = self.model(inputs[None], cache=self.cache)
            text, before = None, 0
            if self.text is not None:
                before = self.text.size
                self.text = text = mx.concatenate([self.text, inputs])
            state: Any = mx.random.state
            drawn, logprobs, keys = [], [], []
            for place in range(len(proposed) + 1):
                token, scores = self._draw(logits[:, place, :], None if text is None else text[: before + place + 1])
                drawn.append(token)
                logprobs.append(scores)
                if proposed:
                    keys.append(state[0])
            started = _Pass(drawn[0], logprobs)
            if proposed:
                started = _Pass(mx.concatenate(drawn), logprobs, list(proposed), mx.stack(keys))
            mx.async_eval(started.drawn, logprobs, *([] if started.keys is None else [started.keys]))
        return started

    def _draw(self, logits: mx.array, text: mx.array | None) -> tuple[mx.array, mx.array]:
        """A token (1,), and the log-probabilities (vocabulary,), from logits (1, vocabulary)."""
        if text is not None:
            for processor in self.processors:
                logits = processor(text, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return self.sampler(logprobs), logprobs.squeeze(0)

    def finish(self, started: _Pass) -> list[int]:
        """Wait for a pass. Returns the tokens to emit; the caches hold those before the last of them."""
        drawn: list[int] = started.drawn.tolist()  # type: ignore[assignment]
        proposed = started.proposed
        right = next((place for place, token in enumerate(proposed) if drawn[place] != token), len(proposed))
        if right < len(proposed):
            rejected = len(proposed) - right
            self.trim(self.offset - rejected)
            if self.text is not None:
                self.text = self.text[: self.text.size - rejected]
            keys: Any = started.keys
            high, low = keys.tolist()[right]
            mx.random.seed(high << 32 | low)  # whose state is these two numbers
        return drawn[: right + 1]
