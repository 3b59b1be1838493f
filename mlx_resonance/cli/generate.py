"""`mlx-resonance generate`: text from a prompt, streamed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..distributed import processes, together
from .options import Factor, Force, KvBits, Memory, Model, PrefillStep, memory_bytes
from .output import count_bar, print_json, progress_bar, stderr

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..generation.batch import Request


@together
def command(
    model: Model,
    prompt: Annotated[str | None, Option(help="The prompt. Default: --prompt-file, or standard input.")] = None,
    prompt_file: Annotated[Path | None, Option(help="Read the prompt from a file.")] = None,
    max_tokens: Annotated[int, Option(help="Most tokens to generate.")] = 256,
    temp: Annotated[float, Option(help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, Option(help="Seed of the sampling.")] = None,
    factor: Factor = None,
    kv_bits: KvBits = None,
    prefill_step_size: PrefillStep = 2048,
    prompt_cache: Annotated[Path | None, Option(metavar="DIR", help="Keep what was read for the next prompt.")] = None,
    prompt_cache_size: Annotated[str, Option(help="Most that DIR may hold.")] = "10GB",
    memory: Memory = None,
    force: Force = False,
    prompts_file: Annotated[Path | None, Option(metavar="JSONL", help="Many prompts: id and prompt a line.")] = None,
    output: Annotated[Path | None, Option(metavar="JSONL", help="Where their answers go.")] = None,
    batch_size: Annotated[int, Option(help="Most answers to --prompts-file at once.")] = 32,
    ignore_chat_template: Annotated[bool, Option("--ignore-chat-template", help="Give the prompt as it is.")] = False,
    json: Annotated[bool, Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Generate text; progress and figures go to stderr."""
    if (prompts_file is None) != (output is None):
        raise ValueError("[generate] --prompts-file and --output go together")
    if prompts_file is not None and (prompt is not None or prompt_file is not None):
        raise ValueError("[generate] give --prompts-file or one prompt, not both")
    if prompts_file is not None and (kv_bits is not None or prompt_cache is not None):
        raise ValueError("[generate] --prompts-file goes with neither --kv-bits nor --prompt-cache")
    if batch_size < 1:
        raise ValueError(f"[generate] batch_size must be at least 1, got {batch_size}")
    group = processes()
    if group.size > 1 and not any(given is not None for given in (prompt, prompt_file, prompts_file)):
        raise ValueError("[generate] more than one process: give --prompt or --prompt-file, not standard input")
    text = "" if prompts_file is not None else read_prompt(prompt, prompt_file)

    from ..config import RopeConfig
    from ..files import TOKENIZER_PATTERNS, WEIGHTS, parse_size, read_config, resolve
    from ..generation import cache_key, check_context, prompt_tokens
    from ..generation.batch import read_requests
    from ..generation.memory import guard
    from ..generation.stream import check_options
    from ..loading import load_tokenizer
    from ..scaling import rescale

    options: dict[str, Any] = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
    check_options(**options, kv_bits=kv_bits, prefill_step_size=prefill_step_size)
    folder = resolve(model, None, [*TOKENIZER_PATTERNS, WEIGHTS])
    config = read_config(folder)
    rope = RopeConfig.from_hf(config)
    rope = rope if factor is None else rescale(rope, factor)
    tokenizer = load_tokenizer(folder, config)
    chat = not ignore_chat_template
    requests = []
    if prompts_file is not None:
        requests = read_requests(prompts_file, tokenizer, chat)
    tokens = [] if requests else prompt_tokens(tokenizer, text, chat)
    longest = max((len(request.tokens) for request in requests), default=len(tokens))
    check_context(rope, longest, max_tokens)
    if not force:
        size = memory_bytes(memory)
        step = prefill_step_size
        parts: dict[str, Any] = {"processes": group.size, "sequences": max(1, min(batch_size, len(requests)))}
        parts |= {} if requests else {"kv_bits": kv_bits}  # a batch keeps keys and values in 16 bits
        guard(folder, longest + max_tokens, memory=size, prefill_step_size=step, **parts)
    kept = None
    if prompt_cache is not None:
        size = parse_size(prompt_cache_size, "--prompt-cache-size")
        kept = group.prompt_cache(prompt_cache, cache_key(folder, rope, kv_bits), size)
    loaded = group.load(folder, rope)
    requests, output, options["seed"] = group.start(tokens, requests, output, seed)
    if output is not None:
        options |= {"prefill_step_size": prefill_step_size, "batch_size": batch_size}
        answer(loaded, tokenizer, requests, output, json, **options)
        return
    options |= {"kv_bits": kv_bits, "prefill_step_size": prefill_step_size, "prompt_cache": kept}
    result = run(loaded, tokenizer, tokens, show=not json, **options)
    if json:
        print_json(result)


def answer(
    model: nn.Module, tokenizer: TokenizerWrapper, requests: list[Request], output: Path, json: bool, **options: Any
) -> None:
    """Answer a file of prompts, with a progress bar."""
    from ..generation.batch import answer_file

    with count_bar() as bar:
        task = bar.add_task("prompts", total=len(requests))
        count = answer_file(
            model,
            tokenizer,
            requests,
            output,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
    stderr.print(f"{output}: {len(requests)} answers, {count} of them new", soft_wrap=True)
    if json:
        print_json({"output": str(output), "answers": len(requests), "new": count})


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
