"""`mlx-resonance eval harness`: lm-eval's tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from typer import Option

from .options import Context, Factor, Force, Json, KvBits, Memory, Model, memory_bytes
from .output import print_json, stderr, stdout


def command(
    model: Model,
    tasks: Annotated[str, Option(help="lm-eval's names, with commas.")],
    include_path: Annotated[Path | None, Option(metavar="DIR", help="Folder with more tasks, as YAML.")] = None,
    num_shots: Annotated[int | None, Option(help="Solved examples in front. Default: the task's.")] = None,
    limit: Annotated[int | None, Option(help="Take so many documents of each task, the first ones.")] = None,
    max_tokens: Annotated[int | None, Option(help="Most tokens of an answer. Default: the task's.")] = None,
    apply_chat_template: Annotated[
        bool, Option("--apply-chat-template", help="Use the tokenizer's chat template.")
    ] = False,
    context: Context = None,
    factor: Factor = None,
    kv_bits: KvBits = None,
    memory: Memory = None,
    force: Force = False,
    output: Annotated[Path | None, Option(metavar="FILE.json", help="Where lm-eval's whole result goes.")] = None,
    json: Json = False,
) -> None:
    """Tasks of lm-eval, which downloads their data, or yours.

    It comes with mlx-resonance[eval].
    """
    from ..evaluation.checkpoint import open_checkpoint
    from ..evaluation.harness import run_harness, tables
    from ..files import user_path
    from ..records import append_records

    size = memory_bytes(memory)
    output = None if output is None else user_path(output)
    if output is not None and output.exists() and output.stat().st_size:
        raise FileExistsError(f"[harness] {output} is there already: choose another --output")
    if output is not None:  # refused now, not after hours
        above = next(folder for folder in output.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise NotADirectoryError(f"[harness] {output} cannot be written: {above} is no folder to write to")
    checkpoint = open_checkpoint(
        "harness", model, context=context, factor=factor, kv_bits=kv_bits, memory=size, force=force
    )
    names = [name.strip() for name in tasks.split(",")]
    result = run_harness(
        checkpoint, names, include_path=None if include_path is None else user_path(include_path),
        num_shots=num_shots, limit=limit, max_tokens=max_tokens, chat=apply_chat_template,
    )  # fmt: skip
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        append_records(output, [result])
        stderr.print(f"wrote {output}")
    if json:
        print_json(result)
    else:
        stdout.print(tables(result), soft_wrap=True)
