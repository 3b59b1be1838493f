"""`mlx-resonance generate`: text from a prompt or a question about files, streamed; or answers to a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..errors import UsageError
from ..storage import check_output_folder
from .options import (
    LARGEST,
    LARGEST_CACHE,
    CacheFolder,
    CacheSize,
    DraftModel,
    Extend,
    Factor,
    Files,
    Force,
    KvBits,
    KvRotate,
    MaxTokens,
    Memory,
    MinP,
    Model,
    Penalty,
    PrefillStep,
    PromptLookup,
    Seed,
    Stop,
    SystemPrompt,
    Temp,
    TopK,
    TopP,
    file,
    kv_format,
    path,
)  # fmt: skip
from .output import check_outputs, count_bar, print_json, progress_bar, stderr
from .processes import Processes, processes, together
from .prompts import STDIN, read_texts

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..generation import Engine, PromptCache, Sampling
    from ..generation.batch import Request


@together
def command(
    model: Model,
    prompt: Annotated[
        str | None, Option("-p", "--prompt", help="The prompt, or a question about the files. Default: standard input.")
    ] = None,
    prompt_file: Files = None,
    system_prompt: SystemPrompt = None,
    max_tokens: MaxTokens = 256,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    factor: Factor = None,
    extend: Extend = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    prompt_lookup: PromptLookup = None,
    draft_model: DraftModel = None,
    prefill_step_size: PrefillStep = 2048,
    prompt_cache: CacheFolder = None,
    prompt_cache_size: CacheSize = None,
    memory: Memory = None,
    force: Force = False,
    prompts_file: Annotated[
        Path | None, Option(**file, metavar="JSONL", help="Many prompts: one id and prompt per line.")
    ] = None,
    output: Annotated[
        Path | None,
        Option(**path, metavar="JSONL", help="Run log for their answers; a second run adds missing ones."),
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Answers generated at once for --prompts-file. Default: 32.")
    ] = None,
    ignore_chat_template: Annotated[bool, Option("--ignore-chat-template", help="Use the prompt as it is.")] = False,
    json: Annotated[bool, Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Generate text; progress and figures go to stderr. Sampling defaults: generation_config.json's, or greedy."""
    group, documents, kv_bits = processes(), prompt_file or [], kv_format(kv_bits, kv_rotate)
    given = {"prompt": prompt, "prompt_file": documents or None, "system_prompt": system_prompt}
    check_combination(given, prompts_file, output, group.size)
    if prompt_cache_size is not None and prompt_cache is None:
        raise UsageError("the size of a prompt cache needs its folder", remedies=[{"prompt_cache": None}])
    if batch_size is not None and prompts_file is None:
        raise UsageError("a batch size is for a file of prompts", remedies=[{"prompts_file": None}])
    check_proposing(prompt_lookup, draft_model, prompts_file, group.size)
    check_outputs(output if group.rank == 0 else None)
    if prompt_cache is not None:
        check_output_folder(prompt_cache, "prompt_cache")
    texts, question = ([], None) if prompts_file is not None else read_texts(prompt, documents)

    from ..checkpoint import Checkpoint
    from ..generation import Engine, check_length, require_memory
    from ..generation.batch import BATCH, read_requests, sequences
    from ..generation.draft import open_draft
    from ..generation.messages import question_tokens
    from ..generation.sampling import sampling_for
    from ..generation.stop import StopStrings

    stops, batch = stop or [], batch_size or BATCH
    StopStrings(stops)  # refused now
    checkpoint = Checkpoint.open(model, factor=factor, extend=extend)
    draft = open_draft(checkpoint, draft_model)
    sampling, defaults = sampling_for(
        checkpoint,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    tokenizer, chat = checkpoint.tokenizer, not ignore_chat_template
    requests = [] if prompts_file is None else read_requests(prompts_file, tokenizer, chat)
    tokens = [] if requests else question_tokens(tokenizer, texts, question, system_prompt, chat)
    longest = max((len(request.tokens) for request in requests), default=len(tokens))
    checkpoint = checkpoint.extended(extend, longest + max_tokens)
    check_length(checkpoint.rope, longest, max_tokens)
    parts: dict[str, Any] = {"processes": group.size, "sequences": sequences([r.tokens for r in requests], batch)}
    parts |= {"memory": memory, "prefill_step_size": prefill_step_size, "kv_bits": kv_bits, "draft": draft}
    require_memory(checkpoint, longest + max_tokens, force, **parts)
    kept = None
    if prompt_cache is not None:
        size_of_it = prompt_cache_size or LARGEST_CACHE
        kept = open_cache(group, checkpoint, kv_bits, (longest + max_tokens, longest), prompt_cache, size_of_it)
    options: dict[str, Any] = {"kv_bits": kv_bits, "prefill_step_size": prefill_step_size, "disk_cache": kept}
    options["agree"] = group.least if group.size > 1 else None
    if output is not None:
        options |= {"max_tokens": max_tokens, "sampling": sampling, "stop": stops, "batch_size": batch}
        template = chat and tokenizer.has_chat_template
        answer(group, checkpoint, requests, output, template, json, defaults, **options)
        return
    options |= {"prompt_lookup": prompt_lookup or "auto", "draft_model": None if draft is None else draft.load()}
    loaded = group.load(checkpoint)
    _, shared_seed = group.start(tokens, [], (), sampling.seed)
    engine = Engine(loaded, tokenizer, **options)
    run(engine, tokens, max_tokens, with_seed(sampling, shared_seed), stop=stops, defaults=defaults, json=json)


def check_combination(given: dict[str, Any], prompts_file: Path | None, output: Path | None, processes: int) -> None:
    """Refuse options that do not work together.

    Args:
        given: `prompt`, `prompt_file`, `system_prompt`, None where not given.
        prompts_file, output: as given.
        processes: number of processes that share the work.
    """
    if prompts_file is not None and output is None:
        raise UsageError("answers to a file of prompts need an output file", remedies=[{"output": None}])
    if prompts_file is None and output is not None:
        raise UsageError("an output file is for the answers to a file of prompts", remedies=[{"prompts_file": None}])
    if prompts_file is not None and any(value is not None for value in given.values()):
        raise UsageError("give a file of prompts or one prompt, not both", option="prompts_file")
    files = given["prompt_file"] or []
    from_stdin = STDIN in files or (prompts_file is None and given["prompt"] is None and not files)
    if processes > 1 and from_stdin:
        raise UsageError("processes cannot share standard input", remedies=[{"prompt": None}, {"prompt_file": None}])


def check_proposing(prompt_lookup: Any, draft_model: str | None, prompts_file: Path | None, processes: int) -> None:
    """Refuse prompt lookup and draft models where they cannot work, or do not work together."""
    if prompt_lookup is not None and prompts_file is not None:
        raise UsageError("prompt lookup is for one text at a time", option="prompt_lookup")
    if draft_model is not None and (prompts_file is not None or processes > 1):
        what = "one text at a time" if prompts_file is not None else "one process"
        raise UsageError(f"a draft model is for {what}", option="draft_model")
    if draft_model is not None:
        from ..generation.draft import check_proposers

        check_proposers(prompt_lookup or "auto", draft_model)


def open_cache(
    group: Processes, checkpoint: Checkpoint, kv_bits: Any, lengths: tuple[int, int], folder: Path, size: int
) -> PromptCache:
    """The on-disk KV cache; each of several processes has its own part. `lengths`: of the whole text, of its prompt."""
    from ..generation.prompt_cache import cache_identity

    return group.prompt_cache(folder, size, cache_identity(checkpoint, kv_bits, *lengths))


def with_seed(sampling: Sampling, seed: int | None) -> Sampling:
    """The sampling with the seed that several processes share."""
    from dataclasses import replace

    return replace(sampling, seed=seed)


def answer(
    group: Processes,
    checkpoint: Checkpoint,
    requests: list[Request],
    output: Path,
    template: bool,
    json: bool,
    defaults: dict[str, Any],
    **options: Any,
) -> None:
    """Answer a file of prompts, with a progress bar; if there are several processes, the first writes the answers."""
    from ..generation.batch import answer_requests, generate_batch, open_answers, refuse_rope
    from ..generation.kv_format import KVFormat
    from .answer import in_words

    refuse_rope(checkpoint.rope)
    sampling: Sampling = options["sampling"]
    settings = checkpoint.settings(KVFormat.of(options["kv_bits"]).value)
    settings |= {"max_tokens": options["max_tokens"]} | sampling.settings()
    if options["stop"]:
        settings["stop"] = options["stop"]
    if sampling.temp > 0:  # an answer then depends on its neighbours
        settings |= {key: options[key] for key in ("batch_size", "prefill_step_size")}
    settings["chat_template"] = template
    log, done = open_answers(output, requests, settings, checkpoint.name) if group.rank == 0 else (None, set())
    model = group.load(checkpoint)
    missing, seed = group.start([], requests, done, sampling.seed)
    options["sampling"] = with_seed(sampling, seed)
    if log is None:
        for _ in generate_batch(model, checkpoint.tokenizer, missing, **options) if missing else ():
            pass
        return
    with count_bar() as bar:
        task = bar.add_task("prompts", completed=len(requests) - len(missing), total=len(requests))
        answer_requests(log, model, checkpoint.tokenizer, missing, lambda: bar.advance(task), **options)
    sampled = f"; {in_words(defaults)}" if defaults else ""
    stderr.print(f"{output}: {len(requests)} answers, {len(missing)} of them new{sampled}", soft_wrap=True)
    if json:
        print_json({"output": str(output), "answers": len(requests), "new": len(missing)})


def run(
    engine: Engine,
    tokens: list[int],
    max_tokens: int,
    sampling: Sampling,
    *,
    stop: list[str] | None = None,
    defaults: dict[str, Any] | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """Generate with a progress bar for the prompt; print the text as it comes, or one object. Returns the object.

    Args:
        engine, tokens, max_tokens, sampling, stop: as of `Engine.stream`.
        defaults: the sampling that comes from the checkpoint.
        json: print an object instead of the text.
    """
    from .answer import Printer, result, summary

    pieces = []
    out = None if json else Printer()
    with progress_bar() as bar:
        task = bar.add_task("prompt", total=len(tokens))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        for response in engine.stream(tokens, max_tokens, sampling=sampling, stop=stop or (), progress=progress):
            bar.stop()  # the prompt is done: the text follows
            pieces.append(response.text)
            if out is not None:
                out.write(response.text)
    if out is not None:
        out.finish()
    stderr.print(summary(response, defaults or {}), soft_wrap=True)
    found = result("".join(pieces), response, defaults or {}, cached=engine.disk_cache is not None)
    if json:
        print_json(found)
    return found
