"""`mlx-resonance eval harness`: lm-eval's tasks."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import BadParameter, Option

from ..errors import UsageError
from ..evaluation.suites import SUITES
from ..rope_types import LONGEST
from .options import (
    LARGEST,
    EvalContext,
    Extend,
    Factor,
    Force,
    Json,
    KvBits,
    KvRotate,
    Memory,
    Model,
    integers,
    kv_format,
    names,
    path,
)
from .output import check_outputs, print_json, progress_bar, stderr, stdout


def _object(text: Any) -> Any:
    """A JSON object; a default as it is."""
    if not isinstance(text, str):
        return text
    try:
        value = json_format.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"{text!r:.60} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadParameter(f"{text!r:.60} is not a JSON object")
    return value


Suite = Literal["ruler", "babilong", "longbench", "longbench2", "infinitebench", "graphwalks", "mrcr", "nolima"]


def command(
    model: Model,
    tasks: Annotated[
        Sequence[str] | None, Option(**names, help="lm-eval's names; `lm-eval ls tasks` lists them.")
    ] = None,
    suite: Annotated[
        Suite | None, Option(metavar="NAME", help=f"A benchmark with its published options: {', '.join(SUITES)}.")
    ] = None,
    lengths: Annotated[
        Sequence[int] | None,
        Option(
            **integers(1, LONGEST), help="Lengths in tokens, for tasks that come in several; of what, the task says."
        ),
    ] = None,
    metadata: Annotated[
        Any, Option(parser=_object, metavar="JSON", help="For tasks that make or read their own data.")
    ] = None,
    include_path: Annotated[Path | None, Option(**path, metavar="DIR", help="Folder with more tasks, as YAML.")] = None,
    num_shots: Annotated[
        int | None, Option(min=0, max=10_000, help="Solved examples in front. Default: the task's.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Ask only the first N documents of each task and length.")
    ] = None,
    max_tokens: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Maximum number of tokens of an answer. Default: the task's.")
    ] = None,
    truncation: Annotated[
        Literal["left", "middle"] | None,
        Option(help="What long prompts lose: their beginning or their middle. Default: left, or the suite's."),
    ] = None,
    apply_chat_template: Annotated[
        bool, Option("--apply-chat-template", help="Use the tokenizer's chat template.")
    ] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let tasks run the code that comes with a tokenizer.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool, Option("--confirm-run-unsafe-code", help="Run tasks that execute what the model writes.")
    ] = False,
    context: EvalContext = None,
    factor: Factor = None,
    extend: Extend = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    force: Force = False,
    output: Annotated[
        Path | None,
        Option(**path, metavar="FILE.jsonl", help="Run log of the responses, from which a killed run resumes."),
    ] = None,
    log_samples: Annotated[
        Path | None, Option(**path, metavar="FILE.jsonl", help="Write documents, prompts, responses and scores.")
    ] = None,
    json: Json = False,
) -> None:
    """Tasks of lm-eval, which downloads their data, or your own tasks.

    It needs the extra `eval`, and for most tasks with long texts `eval-long`.
    """
    if not stderr.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm-eval imports it
    from ..checkpoint import Checkpoint
    from ..evaluation.context import choose_context
    from ..evaluation.harness import run_harness, tables
    from ..evaluation.harness_tasks import check_lengths, lengths_in

    check_outputs(output)
    check_outputs(log_samples, option="log_samples")
    if lengths is not None:
        check_lengths(lengths)
    if (tasks is None) == (suite is None):
        raise UsageError("either tasks or a suite is needed", remedies=[{"tasks": None}, {"suite": None}])
    options: dict[str, Any] = {}
    if suite is not None:
        name, options = SUITES[suite]
        tasks = [name]
    max_tokens = max_tokens or options.get("max_tokens")
    chat = apply_chat_template or options.get("apply_chat_template", False)
    asked = lengths_in(metadata or {}) or lengths or ()
    longest = context or max(asked, default=0) or None
    checkpoint = Checkpoint.open(model, factor=factor).extended(extend, longest)
    kv_bits = kv_format(kv_bits, kv_rotate)
    context = choose_context(checkpoint, context, lengths=asked, kv_bits=kv_bits, memory=memory, force=force)
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        result = run_harness(
            checkpoint, tasks or [], context=context, kv_bits=kv_bits, include_path=include_path, metadata=metadata,
            lengths=lengths, num_shots=num_shots, limit=limit, max_tokens=max_tokens, chat=chat,
            truncation=truncation or options.get("truncation", "left"), trust_remote_code=trust_remote_code,
            confirm_run_unsafe_code=confirm_run_unsafe_code, output=output, log_samples=log_samples,
            progress=lambda kind, done, total: bar.update(task, completed=done, total=total, description=kind),
        )  # fmt: skip
    for written in (output, log_samples):
        if written is not None:
            stderr.print(f"wrote {written}", soft_wrap=True)
    if json:
        print_json(result)
    else:
        stdout.print(tables(result), soft_wrap=True)
