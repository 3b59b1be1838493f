"""generate() and stream_generate(): mlx-lm's functions, within the checkpoint's context."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .._mlx_lm import generation_stream
from ..errors import DeviceError, UsageError, check_option
from ..rope import expect
from ..rope_config import RopeConfig
from ..scaling import check_context
from ..wired import wired
from .cache import cached_tokens, check_format, make_cache, quantize
from .decode import decode
from .draft import check_proposers, draft_for, proposals_for
from .kv_format import KVBits, KVFormat
from .lookup import PromptLookup
from .messages import prompt_tokens
from .prefill import STEP, Pace, Progress, device_errors, prefill
from .prompt_cache import PromptCache, refuse_changing_angles
from .sampling import LogitsProcessor, Sampler, Sampling
from .speculation import Proposals
from .stop import StopStrings
from .text import AnswerText

logger = logging.getLogger("mlx_resonance")
REFUSED = {  # arguments of mlx-lm's
    "max_kv_size": "a rotating KV cache would drop the beginning of the text",
    "input_embeddings": "a prompt is read as tokens",
}


@dataclass
class Response(GenerationResponse):  # type: ignore[misc]  # mypy does not follow mlx-lm
    """mlx-lm's GenerationResponse, and how many of the prompt's tokens came from a cache."""

    cached_tokens: int = 0


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int] | mx.array,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    stream: mx.Stream | mx.ThreadLocalStream = generation_stream,
    *,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    temp: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    prompt_cache: list[Any] | None = None,
    disk_cache: PromptCache | None = None,
    prefill_step_size: int = STEP,
    kv_bits: KVBits = None,
    kv_rotate: bool = False,
    kv_group_size: int | None = None,
    quantized_kv_start: int = 0,
    max_kv_size: int | None = None,
    input_embeddings: mx.array | None = None,
    num_draft_tokens: int | None = None,
    prompt_progress_callback: Progress | None = None,
    stop: Sequence[str] = (),
    prompt_lookup: PromptLookup | None = None,
) -> Iterator[Response]:
    """Generate text, piece by piece: mlx-lm's function of this name, with the checks and caches of this package.

    Args:
        model, tokenizer: from `load`.
        prompt: text, or token ids.
        max_tokens: maximum number of tokens to generate; with the prompt they must fit into the checkpoint's context.
        stream: of MLX, to compute on.
        sampler: makes a token of log-probabilities; mlx-lm's `make_sampler` makes one.
        logits_processors: functions of the tokens so far and the next token's logits, which return new logits.
        temp, top_p: instead of a sampler: the temperature, 0 (the default) for the most likely token, and the total
            probability, in (0, 1], of the tokens to sample from.
        seed: seed of MLX's random numbers; None leaves their state as it is.
        prompt_cache: mlx-lm's caches, one per layer. The prompt continues the text that they hold; they are extended.
        disk_cache: on-disk KV cache of earlier prompts; this one's keys and values are added, even if interrupted.
        prefill_step_size: maximum number of prompt tokens in one pass; fewer as the keys grow.
        kv_bits: quantize keys and values to 4 or 8 bits, from the first token on; two numbers, as (8, 4) or "8,4", are
            for keys and for values.
        kv_rotate: rotate keys and values before they are quantized, which often loses less.
        kv_group_size, quantized_kv_start: mlx-lm's, with kv_bits only as this package quantizes: in groups of 64, or
            of 32 if the head size is no multiple of 64, from token 0.
        draft_model: a small model with the same vocabulary, from `load`: what it thinks most likely is checked, several
            tokens per pass of the model, in place of prompt lookup. It reads the prompt, too.
        num_draft_tokens: always check as many of its tokens; None for as many as pay.
        max_kv_size, input_embeddings: mlx-lm's, not supported.
        prompt_progress_callback: called with the number of prompt tokens done and their total.
        stop: strings of which the first ends the text, which does not include it.
        prompt_lookup: `auto` or a number of tokens: what followed the same words earlier in prompt and answer is
            checked, several tokens per pass of the model: see `decode`; or `off`. None for `auto`, or for `off` where a
            sampler or logits processors are given: they must not keep a state if tokens are checked.

    Returns:
        An iterator of mlx-lm's GenerationResponse: `text` is the new piece, the last one has a `finish_reason`.
        `prompt_tps` counts the tokens that were read, not those from the on-disk KV cache.

    Raises:
        UsageError: an argument is out of range or not supported, the prompt is empty, or the context is too short.
    """
    refuse(max_kv_size=max_kv_size, input_embeddings=input_embeddings)
    check_options(max_tokens, temp or 0.0, 1.0 if top_p is None else top_p, seed, prefill_step_size)
    if prompt_lookup is None:
        prompt_lookup = "auto" if sampler is None and not logits_processors else "off"
    check_proposers(prompt_lookup, draft_model, num_draft_tokens)
    kv_format = KVFormat.of(kv_bits, kv_rotate)
    if kv_format.quantized:
        check_format(model, kv_group_size, quantized_kv_start)
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if isinstance(prompt, mx.array):
        prompt = prompt.tolist()  # type: ignore[assignment]
    tokens = prompt_tokens(tokenizer, prompt, rows=model.args.vocab_size)  # type: ignore[arg-type]
    draft = draft_for(model, tokenizer, draft_model)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "stream": stream,
        "sampler": choose_sampler(sampler, temp, top_p),
        "logits_processors": logits_processors,
        "stop": StopStrings(stop),
        "disk_cache": disk_cache,
        "progress": prompt_progress_callback,
        "proposals": proposals_for(tokens, prompt_lookup, draft, num_draft_tokens),
        "seed": seed,
    }
    cache = open_cache(model, prompt_cache, disk_cache, len(tokens), max_tokens, kv_format)
    before, pace = cache[0].offset, Pace(len(model.layers), prefill_step_size)
    return write(model, tokenizer, tokens, cache, before=before, pace=pace, first_space=False, **options)


def write(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    cache: list[Any],
    *,
    max_tokens: int,
    sampler: Sampler,
    pace: Pace,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    stop: StopStrings | None = None,
    before: int = 0,
    first_space: bool = True,
    stream: mx.Stream | mx.ThreadLocalStream = generation_stream,
    disk_cache: PromptCache | None = None,
    progress: Progress | None = None,
    proposals: Proposals | None = None,
    seed: int | None = None,
) -> Iterator[Response]:
    """Read a prompt and write its answer: what `stream_generate` and the engine have in common.

    Args:
        model, tokenizer, max_tokens, sampler, logits_processors, stream: as in `stream_generate`.
        tokens: the prompt, checked.
        cache: one per layer: a text of `before` tokens that the prompt continues, then the prompt's first tokens.
        pace: decides how many tokens of the prompt are read at once.
        stop: ends the text; None for nothing that does.
        first_space: keep a space that the answer begins with; mlx-lm's own functions drop it.
        disk_cache: if the caches are empty, filled from it; the text is added to it.
        progress: called with the number of prompt tokens done and their total.
        proposals: decides what is proposed; None for a token per pass.
        seed: of MLX's random numbers; None leaves their state as it is.
    """
    start, stop = time.perf_counter(), stop or StopStrings()
    if seed is not None:
        mx.random.seed(seed)
    expect(model, before + len(tokens))
    known = cache[0].offset - before
    if disk_cache is not None and not (known or before):
        known = disk_cache.fetch(tokens, cache)
    written = tokens[:-1]  # those whose keys every layer has
    options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": sampler, "stream": stream}
    options |= {"logits_processors": logits_processors or (), "proposals": proposals}
    crossing, answer = _Crossing(model.args.rope, before + len(tokens)), AnswerText(tokenizer, first_space)
    speed = first = 0.0
    try:
        with device_errors(), wired(stream, model=model), ExitStack() as stack:
            with mx.stream(stream):
                prefill(model, tokens, cache, pace=pace, before=before, prompt_progress_callback=progress)
            steps = stack.enter_context(closing(decode(model, cache, tokens, **options)))
            for count, (token, logprobs) in enumerate(steps, 1):
                if count == 1:
                    first = time.perf_counter()
                    speed = (len(tokens) - known) / (first - start)
                    written = list(tokens)
                    if progress is not None:
                        progress(len(tokens), len(tokens))
                written.append(token)
                crossing.check(before + len(written))
                ended = token in tokenizer.eos_token_ids
                piece = "" if ended else answer.add(token)
                if ended or count == max_tokens:
                    piece += answer.finish()
                text = stop.add(piece)
                if (ended or count == max_tokens) and not stop.found:
                    text += stop.finish()
                reason = "stop" if ended or stop.found else "length" if count == max_tokens else None
                yield Response(
                    text=text,
                    token=token,
                    logprobs=logprobs,
                    from_draft=False,
                    prompt_tokens=len(tokens),
                    prompt_tps=speed,
                    generation_tokens=count,
                    generation_tps=count / max(time.perf_counter() - first, 1e-9),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=reason,
                    cached_tokens=known,
                )
                if reason is not None:
                    return
    except DeviceError:
        for layer in cache:  # there is no telling what the keys of the last tokens are
            layer.trim(max(0, layer.offset - before - (len(tokens) - 1)))
        raise
    finally:
        expect(model, 0)  # whatever the model reads next has a length of its own
        if disk_cache is not None:
            disk_cache.store(written, cache)


class _Crossing:
    """Says once when a text grows past the length at which its angles change; keys in a cache keep theirs."""

    def __init__(self, rope: RopeConfig, prompt: int) -> None:
        length = rope.trained_length if rope.depends_on_length else None
        self.rope, self.length = rope, length if length is not None and prompt <= length else None

    def check(self, tokens: int) -> None:
        """Log a warning if the text has crossed it now."""
        if self.length is not None and tokens > self.length:
            logger.warning(
                f"the text has grown past {self.length:,} tokens, where the angles of {self.rope.rope_type} change: "
                "keys in the cache keep theirs, as in transformers"
            )
            self.length = None


def refuse(**unsupported: Any) -> None:
    """Raise UsageError, with the reason, if an argument of mlx-lm's that is not supported has a value."""
    for name, value in unsupported.items():
        if value is not None:
            raise UsageError(f"{name} is not supported: {REFUSED[name]}")


def choose_sampler(sampler: Sampler | None, temp: float | None, top_p: float | None) -> Sampler:
    """The sampler, or one made of temp and top_p. Raises UsageError if both are given."""
    if sampler is None:
        return Sampling(temp=temp or 0.0, top_p=1.0 if top_p is None else top_p).sampler()
    if temp is not None or top_p is not None:
        raise UsageError("give either a sampler or temp and top_p")
    return sampler


def open_cache(
    model: nn.Module,
    prompt_cache: list[Any] | None,
    disk_cache: PromptCache | None,
    prompt: int,
    new: int,
    kv_format: KVFormat,
) -> list[Any]:
    """The caches for a prompt and its answer: the given ones, or new ones with room for both.

    Raises:
        UsageError: they are not caches, or do not go with the other arguments; or the context is too short.
    """
    if isinstance(prompt_cache, PromptCache):
        raise UsageError("prompt_cache is a list of mlx-lm's caches: give a PromptCache as disk_cache")
    if prompt_cache is not None and disk_cache is not None:
        raise UsageError("give either prompt_cache or disk_cache")
    rope = model.args.rope
    held = 0 if prompt_cache is None else cached_tokens(model, prompt_cache, prompt + new)
    check_length(rope, prompt, new, held)
    if held:
        refuse_changing_angles(rope, "a text cannot be continued from its cached keys")
    if prompt_cache is None:
        return make_cache(model, prompt + new, kv_format)
    if kv_format.quantized:
        quantize(model, prompt_cache, kv_format)
    return prompt_cache


def check_length(rope: RopeConfig, prompt: int, new: int, held: int = 0) -> None:
    """Raise UsageError if a prompt and its answer exceed the context, with the factor that would cover them.

    Args:
        rope: the settings in use.
        prompt, new, held: tokens of the prompt, of the answer, and of the text before the prompt.
    """
    cached = f"{held:,} cached tokens, " if held else ""
    check_context(rope, held + prompt + new, f"{cached}{prompt:,} prompt tokens and {new:,} new ones")


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int] | mx.array,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Generate the whole text: options and errors are those of `stream_generate`. `verbose` prints as mlx-lm's does."""
    pieces = []
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **options):
        if verbose:
            print(response.text, end="", flush=True)
        pieces.append(response.text)
    if verbose:
        print("\n" + "=" * 10)
    if verbose and not any(pieces):
        print("No text generated for this prompt")
    elif verbose:
        print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return "".join(pieces)


def figures(text: str, last: Response) -> dict[str, Any]:
    """The figures that `generate --json` prints, under mlx-lm's names and in its units: tokens per second, GB.

    Args:
        text: the whole generated text.
        last: the last response.
    """
    return {
        "text": text,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": round(last.prompt_tps, 2),
        "generation_tokens": last.generation_tokens,
        "generation_tps": round(last.generation_tps, 2),
        "peak_memory": last.peak_memory,
        "finish_reason": last.finish_reason,
    }


def check_options(
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    prefill_step_size: int,
    batch_size: int = 1,
) -> None:
    """Raise UsageError if an option of `stream_generate` or `generate_batch` is out of range."""
    check_option("max_tokens", max_tokens >= 1, "at least 1", max_tokens)
    Sampling(temp=temp, top_p=top_p, seed=seed)
    check_option("prefill_step_size", prefill_step_size >= 1, "at least 1", prefill_step_size)
    check_option("batch_size", batch_size >= 1, "at least 1", batch_size)
