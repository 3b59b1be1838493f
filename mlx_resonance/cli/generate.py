"""`mlx-resonance generate`: text from a prompt, streamed."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import MissingFileError, UsageError
from ..storage import check_output_folder
from .options import LARGEST, Factor, Force, KvBits, MaxTokens, Memory, Model, PrefillStep, file, path, size
from .output import check_outputs, count_bar, print_json, progress_bar, stderr
from .processes import Processes, processes, together

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..checkpoint import Checkpoint
    from ..generation.batch import Request

LARGEST_PROMPT = 2**28  # bytes


@together
def command(
    model: Model,
    prompt: Annotated[str | None, Option(help="The prompt. Default: --prompt-file, or standard input.")] = None,
    prompt_file: Annotated[Path | None, Option(**path, metavar="FILE", help="Read the prompt from a file.")] = None,
    max_tokens: MaxTokens = 256,
    temp: Annotated[float, Option(min=0, max=100, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, Option(min=0, max=1, help="Sample from the top tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, Option(min=0, max=2**64 - 1, help="Sampling seed.")] = None,
    factor: Factor = None,
    kv_bits: KvBits = None,
    prefill_step_size: PrefillStep = 2048,
    prompt_cache: Annotated[Path | None, Option(**path, metavar="DIR", help="On-disk KV cache of prompts.")] = None,
    prompt_cache_size: Annotated[int, Option(**size, help="Maximum size of DIR.")] = "10GB",  # type: ignore[assignment]
    memory: Memory = None,
    force: Force = False,
    prompts_file: Annotated[
        Path | None, Option(**file, metavar="JSONL", help="Many prompts: one id and prompt per line.")
    ] = None,
    output: Annotated[
        Path | None,
        Option(**path, metavar="JSONL", help="Run log for their answers; a second run adds missing ones."),
    ] = None,
    batch_size: Annotated[int, Option(min=1, max=LARGEST, help="Answers generated at once for --prompts-file.")] = 32,
    ignore_chat_template: Annotated[bool, Option("--ignore-chat-template", help="Use the prompt as it is.")] = False,
    json: Annotated[bool, Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Generate text; progress and figures go to stderr."""
    group = processes()
    given = {"prompt": prompt, "prompt_file": prompt_file, "prompts_file": prompts_file}
    check_combination(given, output, kv_bits, prompt_cache, group.size)
    check_outputs(output if group.rank == 0 else None)
    if prompt_cache is not None:
        check_output_folder(prompt_cache, "prompt_cache")
    text = "" if prompts_file is not None else read_prompt(prompt, prompt_file)

    from ..checkpoint import Checkpoint
    from ..generation import cache_key, check_length, prompt_tokens, require_memory
    from ..generation.batch import read_requests
    from ..generation.stream import check_options

    options: dict[str, Any] = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
    check_options(**options, kv_bits=kv_bits, prefill_step_size=prefill_step_size)
    checkpoint = Checkpoint.open(model, factor=factor)
    tokenizer, chat = checkpoint.tokenizer, not ignore_chat_template
    requests = [] if prompts_file is None else read_requests(prompts_file, tokenizer, chat)
    tokens = [] if requests else prompt_tokens(tokenizer, text, chat)
    longest = max((len(request.tokens) for request in requests), default=len(tokens))
    check_length(checkpoint.rope, longest, max_tokens)
    if not force:
        parts: dict[str, Any] = {"processes": group.size, "sequences": max(1, min(batch_size, len(requests)))}
        parts |= {"memory": memory, "prefill_step_size": prefill_step_size, "kv_bits": kv_bits}
        require_memory(checkpoint, longest + max_tokens, **parts)
    options["prefill_step_size"] = prefill_step_size
    if output is not None:
        settings = checkpoint.settings() | {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
        if temp > 0:  # an answer then depends on its neighbours
            settings |= {"batch_size": batch_size, "prefill_step_size": prefill_step_size}
        settings["chat_template"] = chat and tokenizer.has_chat_template
        answer(group, checkpoint, requests, output, settings, json, batch_size=batch_size, **options)
        return
    kept = None
    if prompt_cache is not None:
        kept = group.prompt_cache(prompt_cache, cache_key(checkpoint, kv_bits), prompt_cache_size)
    loaded = group.load(checkpoint)
    _, options["seed"] = group.start(tokens, [], (), seed)
    result = run(loaded, tokenizer, tokens, show=not json, kv_bits=kv_bits, disk_cache=kept, **options)
    if json:
        print_json(result)


def check_combination(
    given: dict[str, Any], output: Path | None, kv_bits: int | None, prompt_cache: Path | None, processes: int
) -> None:
    """Refuse options that do not work together.

    Args:
        given: `prompt`, `prompt_file`, `prompts_file`.
        output, kv_bits, prompt_cache: as given.
        processes: number of processes that share the work.
    """
    prompts_file, single = given["prompts_file"], given["prompt"] is not None or given["prompt_file"] is not None
    if prompts_file is not None and output is None:
        raise UsageError("answers to a file of prompts need an output file", remedies=[{"output": None}])
    if prompts_file is None and output is not None:
        raise UsageError("an output file is for the answers to a file of prompts", remedies=[{"prompts_file": None}])
    if prompts_file is not None and single:
        raise UsageError("give a file of prompts or one prompt, not both", option="prompts_file")
    if prompts_file is not None and kv_bits is not None:
        raise UsageError("a batch keeps its KV cache in the model's type: leave the bits out", option="kv_bits")
    if prompts_file is not None and prompt_cache is not None:
        raise UsageError("a batch does not use a prompt cache: leave it out", option="prompt_cache")
    if processes > 1 and not single and prompts_file is None:
        raise UsageError("processes cannot share standard input", remedies=[{"prompt": None}, {"prompt_file": None}])


def answer(
    group: Processes,
    checkpoint: Checkpoint,
    requests: list[Request],
    output: Path,
    settings: dict[str, Any],
    json: bool,
    **options: Any,
) -> None:
    """Answer a file of prompts, with a progress bar; if there are several processes, the first writes the answers."""
    from ..generation.batch import answer_requests, generate_batch, open_answers
    from ..generation.prompt_cache import refuse_changing_angles

    refuse_changing_angles(checkpoint.rope, "a batch has texts of several lengths")
    log, done = open_answers(output, requests, settings, checkpoint.name) if group.rank == 0 else (None, set())
    model = group.load(checkpoint)
    missing, options["seed"] = group.start([], requests, done, options["seed"])
    if log is None:
        for _ in generate_batch(model, checkpoint.tokenizer, missing, **options) if missing else ():
            pass
        return
    with count_bar() as bar:
        task = bar.add_task("prompts", completed=len(requests) - len(missing), total=len(requests))
        answer_requests(log, model, checkpoint.tokenizer, missing, lambda: bar.advance(task), **options)
    stderr.print(f"{output}: {len(requests)} answers, {len(missing)} of them new", soft_wrap=True)
    if json:
        print_json({"output": str(output), "answers": len(requests), "new": len(missing)})


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from whichever source was given.

    Raises:
        UsageError: both sources or neither were given, or the prompt is empty, too large or not UTF-8.
        MissingFileError: there is no such file.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("give a prompt or a prompt file, not both", option="prompt_file")
    if prompt is None and prompt_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("no prompt was given", remedies=[{"prompt": None}, {"prompt_file": None}])
    if prompt_file is not None and (prompt_file.is_dir() or not prompt_file.exists()):
        raise MissingFileError(f"{prompt_file}: no such file", option="prompt_file")
    try:
        text = _read(prompt_file) if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text: {error}", option="prompt_file") from None
    if not text.strip():
        raise UsageError("the prompt is empty", option="prompt")
    return text


def _read(prompt_file: Path | None) -> str:
    """A file, or standard input: a device or a pipe may never end."""
    with prompt_file.open("rb") if prompt_file else nullcontext(sys.stdin.buffer) as source:
        content = source.read(LARGEST_PROMPT + 1)
    if len(content) > LARGEST_PROMPT:
        raise UsageError(f"the prompt has more than {LARGEST_PROMPT} bytes", option="prompt_file")
    return content.decode("utf-8")  # the locale may have another encoding


def run(model: nn.Module, tokenizer: TokenizerWrapper, tokens: list[int], show: bool, **options: Any) -> dict[str, Any]:
    """Generate with a progress bar for the prompt; stream the text to stdout if `show`. Returns the figures."""
    from ..generation import figures, stream_generate
    from ..sizes import format_size

    pieces = []
    with progress_bar() as bar:
        task = bar.add_task("prompt", total=len(tokens))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        responses = stream_generate(model, tokenizer, tokens, prompt_progress_callback=progress, **options)
        for response in responses:
            bar.stop()  # the prompt is done: the text follows
            pieces.append(response.text)
            if show:
                print(response.text, end="", flush=True)
    if show:
        print(flush=True)
    result = figures("".join(pieces), response)
    stderr.print(
        f"prompt {result['prompt_tokens']:,} tokens, {result['prompt_tps']:,.0f} tokens/s; "
        f"generated {result['generation_tokens']:,} tokens, {result['generation_tps']:,.0f} tokens/s; "
        f"peak memory {format_size(1e9 * result['peak_memory'])}",
        soft_wrap=True,
    )
    return result
