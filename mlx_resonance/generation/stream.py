"""generate() and stream_generate(): mlx-lm's generation, within the checkpoint's context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError, check_option
from ..rope import expect
from ..rope_config import RopeConfig
from ..scaling import check_context
from .cache import make_cache
from .prefill import STEP, Progress, prefill
from .prompt_cache import PromptCache


def prompt_tokens(tokenizer: TokenizerWrapper, prompt: str | list[int], chat: bool = False) -> list[int]:
    """The token ids of a prompt.

    Args:
        tokenizer: from `load`.
        prompt: text, or token ids, which are returned as they are.
        chat: put the text as a user message into the tokenizer's chat template, if it has one.

    Raises:
        UsageError: the prompt is empty.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UsageError("the prompt is empty", option="prompt")
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt is not UTF-8 text", option="prompt")
    if chat and tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    starts_with_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(prompt, add_special_tokens=not starts_with_bos))


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int = STEP,
    prompt_cache: PromptCache | None = None,
    progress: Progress | None = None,
) -> Iterator[GenerationResponse]:
    """Generate text, piece by piece.

    Args:
        model, tokenizer: from `load`.
        prompt: text, or token ids.
        max_tokens: maximum number of tokens to generate; with the prompt they must fit into the checkpoint's context.
        temp: sampling temperature; 0 takes the most likely token.
        top_p: sample from the most likely tokens that have this total probability, in (0, 1].
        seed: seed of MLX's random numbers; None leaves their state as it is.
        kv_bits: quantize keys and values to 4 or 8 bits, from the first token on.
        prefill_step_size: maximum number of prompt tokens in one pass; fewer as the keys grow.
        prompt_cache: on-disk KV cache of earlier prompts; this one's keys and values are added, even if interrupted.
        progress: called with the number of prompt tokens done and their total.

    Returns:
        An iterator of mlx-lm's GenerationResponse: `text` is the new piece, the last one has a `finish_reason`.
        `prompt_tps` counts the tokens that were read, not those from the prompt cache.

    Raises:
        UsageError: an argument is out of range, the prompt is empty, or the context is too short.
    """
    check_options(max_tokens, temp, top_p, seed, prefill_step_size, kv_bits)
    tokens = prompt_tokens(tokenizer, prompt)
    check_length(model.args.rope, len(tokens), max_tokens)
    expect(model, len(tokens))
    if seed is not None:
        mx.random.seed(seed)
    cache = make_cache(model, len(tokens) + max_tokens, kv_bits)
    sampler = make_sampler(temp=temp, top_p=top_p if top_p < 1 else 0.0)
    return _stream(model, tokenizer, tokens, cache, max_tokens, sampler, prefill_step_size, prompt_cache, progress)


def _stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    cache: list[Any],
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array],
    step: int,
    prompt_cache: PromptCache | None,
    progress: Progress | None,
) -> Iterator[GenerationResponse]:
    start = time.perf_counter()
    known = 0 if prompt_cache is None else prompt_cache.fetch(tokens, cache)
    written = tokens[:-1]  # those whose keys every layer has
    try:
        with wired_limit(model, [generation_stream]), mx.stream(generation_stream):
            prefill(model, tokens, cache, step=step, progress=progress)
        speed = 0.0
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": sampler, "prompt_cache": cache}
        for response in mlx_lm.stream_generate(model, tokenizer, tokens[-1:], **options):
            if not speed:
                speed = (len(tokens) - known) / (time.perf_counter() - start)
                written = list(tokens)
                if progress is not None:
                    progress(len(tokens), len(tokens))
            written.append(response.token)
            yield replace(response, prompt_tokens=len(tokens), prompt_tps=speed)
    finally:
        if prompt_cache is not None:
            prompt_cache.store(written, cache)


def check_length(rope: RopeConfig, prompt: int, new: int) -> None:
    """Raise UsageError if a prompt and its answer exceed the context, with the factor that would cover them."""
    check_context(rope, prompt + new, f"{prompt} prompt tokens and {new} new ones")


def generate(model: nn.Module, tokenizer: TokenizerWrapper, prompt: str | list[int], **options: Any) -> str:
    """Generate the whole text. Options and errors are those of `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def figures(text: str, last: GenerationResponse) -> dict[str, Any]:
    """The figures that `generate --json` prints, under mlx-lm's names: tokens per second, and bytes of memory.

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
        "peak_memory": mx.get_peak_memory(),
        "finish_reason": last.finish_reason,
    }


def check_options(
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    prefill_step_size: int,
    kv_bits: int | None = None,
    batch_size: int = 1,
) -> None:
    """Raise UsageError if an option of `stream_generate` or `generate_batch` is out of range."""
    check_option("max_tokens", max_tokens >= 1, "at least 1", max_tokens)
    check_option("temp", 0 <= temp < float("inf"), "0 or more", temp)
    check_option("top_p", 0 < top_p <= 1, "in (0, 1]", top_p)
    check_option("seed", seed is None or 0 <= seed < 2**64, "in [0, 2**64)", seed)
    check_option("prefill_step_size", prefill_step_size >= 1, "at least 1", prefill_step_size)
    check_option("kv_bits", kv_bits in (None, 4, 8), "4 or 8", kv_bits)
    check_option("batch_size", batch_size >= 1, "at least 1", batch_size)
