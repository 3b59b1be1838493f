"""`mlx-resonance eval leval`: L-Eval's questions on long documents, answered greedily and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from typer import Option

from ..errors import UsageError
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
    file,
    kv_format,
    path,
)
from .output import check_outputs, count_bar, print_json, stdout

if TYPE_CHECKING:
    from ..run_log import Record

OTHERS = {"LongBench": {"input", "context", "answers"}, "RULER": {"index", "input", "outputs"}}  # their fields


def command(
    model: Model,
    data: Annotated[
        list[Path], Option(**file, metavar="FILE.jsonl", help="File of a task; may be given several times.")
    ],
    output: Annotated[
        Path, Option(**path, metavar="FILE.jsonl", help="Run log of the answers, from which a killed run resumes.")
    ],
    context: EvalContext = None,
    max_tokens: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Maximum number of tokens of an answer. Default: L-Eval's.")
    ] = None,
    limit: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Ask only the first N questions of each task.")
    ] = None,
    truncation: Annotated[Literal["words", "head"], Option(help="How to cut long prompts.")] = "words",
    ignore_chat_template: Annotated[
        bool, Option("--ignore-chat-template", help="Ask without the tokenizer's chat template.")
    ] = False,
    factor: Factor = None,
    extend: Extend = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Questions of L-Eval on long documents, except those for a judge."""
    from ..checkpoint import Checkpoint
    from ..evaluation import leval
    from ..evaluation.answers import Answers
    from ..evaluation.context import choose_context, describe
    from ..evaluation.prompts import Limits, check_fits
    from ..wired import wired

    check_outputs(output)
    refuse_other_benchmarks(data)
    checkpoint = Checkpoint.open(model, factor=factor).extended(extend, context)
    kv_bits = kv_format(kv_bits, kv_rotate)
    context = choose_context(checkpoint, context, kv_bits=kv_bits, memory=memory, force=force)
    tokenizer, asked = checkpoint.tokenizer, Counter[str]()
    limits = Limits(context, truncation, not ignore_chat_template and tokenizer.has_chat_template)
    prompts = []
    for prompt in leval.make_prompts(data, max_tokens):
        asked[prompt.task] += 1
        if limit is None or asked[prompt.task] <= limit:
            check_fits(tokenizer, prompt, limits)  # refused now, not after hours
            prompts.append(prompt)
    settings = {"context": context, "truncation": truncation, "chat_template": limits.chat, "max_tokens": max_tokens}
    answers = Answers(leval.KIND, checkpoint, output, settings, kv_bits)
    lines: list[Record] = []
    with count_bar() as bar, wired():
        task = bar.add_task("", total=len(prompts))
        for prompt in prompts:
            lines.append(answers.ask(prompt, limits))
            bar.update(task, advance=1, description=prompt.task)
    rows = leval.summary(lines)
    mean = round(fmean(row["score"] for row in rows), 2)
    if json:
        result: Record = {"output": str(output), "answers": len(lines), "score": mean, "results": rows}
        about = describe(checkpoint, kv_bits, context=context, truncation=truncation, chat_template=limits.chat)
        print_json(result | about)
    else:
        show(rows, mean)


def refuse_other_benchmarks(paths: Sequence[Path]) -> None:
    """Raise UsageError where a file is of a benchmark that another command runs now."""
    from ..run_log import json_lines

    for data in paths:
        first: Any = next(iter(json_lines(data)), (0, None))[1] if data.is_file() else None
        for name, fields in OTHERS.items():
            if isinstance(first, dict) and fields <= set(first):
                command = f"mlx-resonance eval harness --suite {name.lower()}"
                raise UsageError(f"{data} is a file of {name}, whose tasks {command} runs", option="data")


def show(rows: list[Record], mean: float) -> None:
    """Print the scores of tasks as a table."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "n", "cut", "score"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        figures = (row["n"], row["truncated"], f"{row['score']:.2f}")
        table.add_row(f"{row['task']} ({row['metric']})", *map(str, figures))
    table.add_row("mean", "", "", f"{mean:.2f}")
    stdout.print(table)
