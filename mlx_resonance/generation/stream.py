"""generate() and stream_generate(): mlx-lm's generation, refusing what the checkpoint's context cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import RopeConfig
from ..rope import ResonanceRoPE


def context_length(model: nn.Module) -> int | None:
    """Tokens of context a loaded model is meant for; None where its config does not say."""
    rope: RopeConfig = model.args.rope
    return rope.context_length


def prompt_tokens(tokenizer: TokenizerWrapper, prompt: str | list[int], chat: bool = False) -> list[int]:
    """The token ids of a prompt.

    Args:
        tokenizer: from `load`.
        prompt: text, or token ids as they are.
        chat: put the text as a user's message into the tokenizer's chat template, where it has one.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("[generate] the prompt is empty")
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("[generate] the prompt is not UTF-8 text")
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
    prefill_step_size: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[GenerationResponse]:
    """Generate text, piece by piece.

    Args:
        model, tokenizer: from `load`.
        prompt: text, or token ids.
        max_tokens: most tokens to generate; prompt and these must fit into the checkpoint's context.
        temp: sampling temperature; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this total probability, in (0, 1].
        seed: of MLX's random numbers; None leaves them as they are.
        kv_bits: keep keys and values in 4 or 8 bits, from the first token on.
        prefill_step_size: tokens of the prompt in one pass.
        progress: called with the number of prompt tokens done and their total.

    Returns:
        An iterator of mlx-lm's GenerationResponse: `text` is the new piece, the last one has a `finish_reason`.

    Raises:
        ValueError: an argument is out of range, the prompt is empty, or the context too short.
    """
    _check_options(max_tokens, temp, top_p, seed, kv_bits, prefill_step_size)
    tokens = prompt_tokens(tokenizer, prompt)
    limit = context_length(model)
    if limit is not None and len(tokens) + max_tokens > limit:
        raise ValueError(
            f"[generate] {len(tokens)} prompt tokens and {max_tokens} new ones exceed the checkpoint's context of "
            f"{limit} tokens: shorten them, or convert with a larger --factor"
        )
    for module in model.modules():
        if isinstance(module, ResonanceRoPE):
            module.expect(len(tokens))
    if seed is not None:
        mx.random.seed(seed)
    options: dict[str, Any] = {"kv_bits": kv_bits, "quantized_kv_start": 0} if kv_bits else {}
    responses: Iterator[GenerationResponse] = mlx_lm.stream_generate(
        model,
        tokenizer,
        tokens,
        max_tokens=max_tokens,
        sampler=make_sampler(temp=temp, top_p=top_p if top_p < 1 else 0.0),
        prefill_step_size=prefill_step_size,
        prompt_progress_callback=progress,
        **options,
    )
    return responses


def generate(model: nn.Module, tokenizer: TokenizerWrapper, prompt: str | list[int], **options: Any) -> str:
    """Generate text, whole. Options, errors: as `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def figures(text: str, last: GenerationResponse) -> dict[str, Any]:
    """What `generate --json` prints, as mlx-lm names it; tokens per second, bytes.

    Args:
        text: all of the generated text.
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


def _check_options(
    max_tokens: int, temp: float, top_p: float, seed: int | None, kv_bits: int | None, prefill_step_size: int
) -> None:
    if max_tokens < 1:
        raise ValueError(f"[generate] max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= temp < float("inf"):
        raise ValueError(f"[generate] temp must be 0 or more, got {temp}")
    if not 0 < top_p <= 1:
        raise ValueError(f"[generate] top_p must lie in (0, 1], got {top_p}")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"[generate] seed must lie in [0, 2**64), got {seed}")
    if kv_bits not in (None, 4, 8):
        raise ValueError(f"[generate] kv_bits must be 4 or 8, got {kv_bits}")
    if prefill_step_size < 1:
        raise ValueError(f"[generate] prefill_step_size must be at least 1, got {prefill_step_size}")
