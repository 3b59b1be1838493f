"""`mlx-resonance generate`: text from a prompt, streamed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from .output import print_json, progress_bar, stderr

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def command(
    model: Annotated[str, Option(help="Folder or Hugging Face hub id.")],
    prompt: Annotated[str | None, Option(help="The prompt. Default: --prompt-file, or standard input.")] = None,
    prompt_file: Annotated[Path | None, Option(help="Read the prompt from a file.")] = None,
    max_tokens: Annotated[int, Option(help="Most tokens to generate.")] = 256,
    temp: Annotated[float, Option(help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, Option(help="Seed of the sampling.")] = None,
    kv_bits: Annotated[int | None, Option(help="Keep keys and values in 4 or 8 bits.")] = None,
    prefill_step_size: Annotated[int, Option(help="Prompt tokens in one pass.")] = 2048,
    ignore_chat_template: Annotated[bool, Option("--ignore-chat-template", help="Give the prompt as it is.")] = False,
    json: Annotated[bool, Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Generate text; progress and figures go to stderr."""
    text = read_prompt(prompt, prompt_file)

    from ..generation import prompt_tokens
    from ..loading import load

    loaded, tokenizer = load(model)
    tokens = prompt_tokens(tokenizer, text, chat=not ignore_chat_template)
    options = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed, "kv_bits": kv_bits}
    result = run(loaded, tokenizer, tokens, show=not json, prefill_step_size=prefill_step_size, **options)
    if json:
        print_json(result)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from whichever source was given.

    Raises:
        ValueError: both sources were given, none was, the prompt is empty or not UTF-8.
        FileNotFoundError: there is no such file.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("[generate] give --prompt or --prompt-file, not both")
    if prompt is None and prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("[generate] give --prompt, --prompt-file, or a prompt on standard input")
    if prompt_file is not None and (prompt_file.is_dir() or not prompt_file.exists()):
        raise FileNotFoundError(f"[generate] no prompt file {prompt_file}")
    try:
        if prompt is not None:
            text = prompt
        else:  # the bytes: the locale's encoding may be another
            text = (prompt_file.read_bytes() if prompt_file else sys.stdin.buffer.read()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[generate] the prompt is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError("[generate] the prompt is empty")
    return text


def run(model: nn.Module, tokenizer: TokenizerWrapper, tokens: list[int], show: bool, **options: Any) -> dict[str, Any]:
    """Generate with a progress bar for the prompt, stream the text to stdout where `show`. Returns the figures."""
    from ..generation import figures, stream_generate

    pieces = []
    with progress_bar() as bar:
        task = bar.add_task("prompt", total=len(tokens))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        responses = stream_generate(model, tokenizer, tokens, progress=progress, **options)
        for response in responses:
            bar.stop()  # the prompt is done: the text follows
            pieces.append(response.text)
            if show:
                print(response.text, end="", flush=True)
    if show:
        print(flush=True)
    result = figures("".join(pieces), response)
    stderr.print(
        f"prompt {result['prompt_tokens']} tokens, {result['prompt_tps']:,.0f} tokens/s; "
        f"generated {result['generation_tokens']} tokens, {result['generation_tps']:,.0f} tokens/s; "
        f"peak memory {result['peak_memory'] / 1e6:,.0f} MB",
        soft_wrap=True,
    )
    return result
