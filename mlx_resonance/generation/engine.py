"""The engine: a loaded model, the text that its KV cache holds, and what is promised for every text that it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .._mlx_lm import generation_stream
from ..checkpoint import Checkpoint
from ..errors import UsageError, check_option
from ..rope import expect
from ..rope_config import RopeConfig
from ..rope_types import LONGEST
from ..scaling import check_context, larger_context
from ..tokenizer import check_ids
from ..wired import wired
from .cache import make_cache
from .draft import check_proposers, draft_for, proposals_for
from .kv_format import KVBits, KVFormat
from .lookup import PromptLookup
from .memory import MemoryPlan, plan_memory, require_memory
from .prefill import STEP, Pace, Progress, prefill
from .prompt_cache import PromptCache, common_prefix
from .sampling import LogitsProcessor, Sampling
from .stop import StopStrings
from .stream import Response, check_length, write

ENOUGH = 256  # tokens more that an entry on disk must hold than the cache in memory, to be read instead
GROWTH = 256  # tokens that a cache grows by, at least
LONGEST_ROOM = 4096  # tokens that it has room for after a prompt; a longer answer lets it grow again
ROOM = 1024  # tokens that a cache has room for after a beginning, so that the first question does not copy it


class Engine:
    """Writes one text after another; one that begins like the last is read only from where they differ.

    Every text keeps to the context, is read in chunks of bounded time, into a KV cache of one format, and may come from
    and go to the on-disk cache: whoever asks for it.

    Args:
        model, tokenizer: from `load`.
        kv_bits, kv_rotate: for a quantized KV cache, as in `KVFormat.of`.
        prefill_step_size: maximum number of prompt tokens in one pass.
        disk_cache: on-disk KV cache.
        context: maximum tokens of a prompt and its answer, such as a memory plan allows; None for the checkpoint's.
        prompt_lookup: as in `stream_generate`; `auto` is off for several processes, whose times differ.
        draft_model: as in `stream_generate`, for one process.
        agree: for several processes, as of `Pace`.

    Raises:
        UsageError: an option is out of range, or the KV cache cannot be quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        kv_bits: KVBits = None,
        kv_rotate: bool = False,
        prefill_step_size: int = STEP,
        disk_cache: PromptCache | None = None,
        context: int | None = None,
        prompt_lookup: PromptLookup = "auto",
        draft_model: nn.Module | None = None,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        check_option("prefill_step_size", prefill_step_size >= 1, "at least 1", prefill_step_size)
        self.model, self.tokenizer, self.disk_cache = model, tokenizer, disk_cache
        self.kv_format = KVFormat.of(kv_bits, kv_rotate)
        check_proposers(prompt_lookup, draft_model)
        if draft_model is not None and agree is not None:
            raise UsageError("a draft model is for one process", option="draft_model")
        self.draft = draft_for(model, tokenizer, draft_model)
        self.prompt_lookup: PromptLookup = "off" if agree is not None and prompt_lookup == "auto" else prompt_lookup
        self.pace = Pace(len(model.layers), prefill_step_size, agree=agree)
        self.context = context if context is not None else self.rope.context_length
        self._given = context is not None  # then nothing may exceed it: memory was planned for it
        self.tokens: list[int] = []  # whose keys and values the caches hold
        self.cache: list[Any] = make_cache(model, GROWTH, self.kv_format)
        self._prompt = 0  # length of the last prompt: it decides angles that change with the length

    @property
    def rope(self) -> RopeConfig:
        """The model's rope settings."""
        found: RopeConfig = self.model.args.rope
        return found

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model has."""
        found: int = self.model.args.vocab_size
        return found

    def stream(
        self,
        tokens: Sequence[int],
        max_tokens: int | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: Progress | None = None,
    ) -> Iterator[Response]:
        """Write the answer to a prompt, piece by piece. Closing the iterator stops after the token in progress.

        Args:
            tokens: the prompt's token ids.
            max_tokens: maximum number of tokens to generate; None for what the context has room for.
            sampling: how to choose tokens; None for the most likely ones.
            stop: strings of which the first ends the text, which does not include it.
            logits_processors: further ones, after the sampling's.
            progress: called with the number of prompt tokens done and their total.

        Raises:
            UsageError: an argument is out of range, or prompt and answer exceed the context.
        """
        prompt, sampling = list(tokens), sampling or Sampling()
        sampling.check(self.vocabulary)
        stops = StopStrings(stop)
        new = self.check(prompt, max_tokens)
        processors = [*sampling.processors(), *logits_processors]
        options: dict[str, Any] = {"sampler": sampling.sampler(), "logits_processors": processors, "stop": stops}
        options["progress"] = progress
        return self._stream(prompt, new, sampling.seed, options)

    def check(self, tokens: Sequence[int], max_tokens: int | None = None) -> int:
        """Check a request before anything is computed. Returns the maximum number of tokens to generate.

        Raises:
            UsageError: the prompt is empty or has a token outside the vocabulary, or with its answer it exceeds the
                context; the message has the longest prompt that fits.
        """
        if not tokens:
            raise UsageError("the prompt is empty", option="prompt")
        check_option("max_tokens", max_tokens is None or max_tokens >= 1, "at least 1", max_tokens)
        check_ids(self.tokenizer, list(tokens), self.vocabulary)
        rope, new, limit = self.rope, max_tokens or 1, self.context
        if limit is not None and len(tokens) + new > limit:
            if self._given and (limit != rope.context_length or rope.length_if_unscaled is not None):
                words, remedies = _in_words(len(tokens), new, limit), larger_context(rope, limit, len(tokens) + new)
                raise UsageError(f"{words} exceed the context of {limit:,} tokens in use here", remedies=remedies)
            check_context(rope, len(tokens) + new, _in_words(len(tokens), new, limit))
            limit = rope.length_if_unscaled or limit  # the file does not say which: there is a warning
        check_length(rope, len(tokens), new)
        return new if max_tokens is not None else (LONGEST if limit is None else limit) - len(tokens)

    def read(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Read the beginning of prompts, so that those that begin with it need not. Raises UsageError like `check`."""
        prompt = list(tokens)
        self.check(prompt)
        cache = self._prepare(prompt, 1 + ROOM)
        if self.disk_cache is not None and not cache[0].offset:
            self.disk_cache.fetch(prompt, cache)
        try:
            with wired(generation_stream, model=self.model), mx.stream(generation_stream):
                prefill(self.model, prompt, cache, pace=self.pace, prompt_progress_callback=progress)
        finally:
            expect(self.model, 0)
            self._keep(prompt)
            if self.disk_cache is not None:
                self.disk_cache.store(self.tokens, cache)

    def clear(self) -> None:
        """Forget the last text."""
        self.cache, self.tokens = make_cache(self.model, GROWTH, self.kv_format), []

    def _stream(self, prompt: list[int], new: int, seed: int | None, options: dict[str, Any]) -> Iterator[Response]:
        cache = self._prepare(prompt, new)
        text, disk = list(prompt), self.disk_cache
        answer = write(
            self.model, self.tokenizer, prompt, cache, max_tokens=new, pace=self.pace, disk_cache=disk,
            proposals=proposals_for(prompt, self.prompt_lookup, self.draft), seed=seed, **options,
        )  # fmt: skip
        try:
            with closing(answer):  # type: ignore[type-var]  # a generator
                for response in answer:
                    text.append(response.token)
                    yield response
        finally:
            self._keep(text)

    def _prepare(self, prompt: list[int], new: int) -> list[Any]:
        """The caches for a prompt: they hold as much of its beginning as the last text has, and have room for all."""
        known = common_prefix(prompt[:-1], self.tokens)
        rope = self.model.args.rope
        if known and rope.depends_on_length and rope.frequencies(self._prompt) != rope.frequencies(len(prompt)):
            known = 0  # the last text's keys have other angles
        if self.disk_cache is not None and self.disk_cache.known(prompt) >= known + ENOUGH:
            known = 0
        if not known:
            self.clear()
        for layer in self.cache:
            layer.trim(layer.offset - known)
            layer.step = max(GROWTH, len(prompt) + min(new, LONGEST_ROOM) - known)  # what it grows by, if it has to
        self.tokens, self._prompt = prompt[:known], len(prompt)
        expect(self.model, len(prompt))
        return self.cache

    def _keep(self, text: list[int]) -> None:
        """Remember which tokens the caches hold; after an interrupt some layers may have counted one more."""
        held = min(len(text), *(layer.offset for layer in self.cache))
        for layer in self.cache:
            layer.trim(layer.offset - held)
        self.tokens = text[:held]


def _in_words(prompt: int, new: int, limit: int) -> str:
    room = f" (with them, a prompt of up to {limit - new:,} fits)" if limit > new else ""
    return f"{prompt:,} prompt tokens and {new:,} new ones{room}"


def plan_context(
    checkpoint: Checkpoint, context: int | None, force: bool = False, **options: Any
) -> tuple[int | None, MemoryPlan | None]:
    """How many tokens of context an engine has: those asked for, or the checkpoint's, or as many as memory holds.

    Args:
        checkpoint: an opened one.
        context: tokens asked for; None for the checkpoint's own.
        force: the plan may exceed the memory.
        options: `kv_bits`, `kv_rotate`, `memory`, `prefill_step_size`, `draft`, as in `plan_memory`.

    Returns:
        The tokens, None for no limit, and the plan for them; the first may be None with `force`, the second is.

    Raises:
        UsageError: the context asked for exceeds the checkpoint's or the memory, or memory holds none at all.
    """
    if context is not None:
        check_context(checkpoint.rope, context)
    wanted = context if context is not None else checkpoint.rope.context_length
    plan = plan_memory(checkpoint, wanted if wanted is not None else LONGEST, **options)
    if force:
        return wanted, None
    wanted = plan.context
    if context is None and not _safe(plan):
        low, high = 0, wanted
        while low < high:  # the largest context that is safe
            middle = (low + high + 1) // 2
            safe = _safe(plan_memory(checkpoint, middle, **options))
            low, high = (middle, high) if safe else (low, middle - 1)
        if low >= GROWTH:
            return low, plan_memory(checkpoint, low, **options)
    require_memory(checkpoint, wanted, **options)
    return wanted, plan


def _safe(plan: MemoryPlan) -> bool:
    return plan.fits and not plan.tight
