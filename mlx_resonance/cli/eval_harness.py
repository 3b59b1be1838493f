"""`mlx-resonance eval harness`: lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from .options import LARGEST, Context, Factor, Force, Json, KvBits, KvRotate, Memory, Model, kv_format, names, path
from .output import check_outputs, print_json, stderr, stdout


def command(
    model: Model,
    tasks: Annotated[Sequence[str], Option(**names, help="lm-eval's names; `lm-eval ls tasks` lists them.")],
    include_path: Annotated[Path | None, Option(**path, metavar="DIR", help="Folder with more tasks, as YAML.")] = None,
    num_shots: Annotated[
        int | None, Option(min=0, max=10_000, help="Solved examples in front. Default: the task's.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Ask only the first N documents of each task.")
    ] = None,
    max_tokens: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Maximum number of tokens of an answer. Default: the task's.")
    ] = None,
    apply_chat_template: Annotated[
        bool, Option("--apply-chat-template", help="Use the tokenizer's chat template.")
    ] = False,
    context: Context = None,
    factor: Factor = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    force: Force = False,
    output: Annotated[
        Path | None,
        Option(**path, metavar="FILE.jsonl", help="Run log of the responses, from which a killed run resumes."),
    ] = None,
    json: Json = False,
) -> None:
    """Tasks of lm-eval, which downloads their data, or your own tasks.

    It needs the extra `eval`.
    """
    from ..checkpoint import Checkpoint
    from ..evaluation.context import choose_context
    from ..evaluation.harness import run_harness, tables

    check_outputs(output)
    checkpoint = Checkpoint.open(model, factor=factor)
    kv_bits = kv_format(kv_bits, kv_rotate)
    context = choose_context(checkpoint, context, kv_bits=kv_bits, memory=memory, force=force)
    result = run_harness(
        checkpoint, tasks, context=context, kv_bits=kv_bits, include_path=include_path, num_shots=num_shots,
        limit=limit, max_tokens=max_tokens, chat=apply_chat_template, output=output,
    )  # fmt: skip
    if output is not None:
        stderr.print(f"wrote {output}", soft_wrap=True)
    if json:
        print_json(result)
    else:
        stdout.print(tables(result), soft_wrap=True)
