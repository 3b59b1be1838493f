"""`mlx-resonance eval leval`, `longbench`, `ruler`: tasks on long texts, answered greedily and scored."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from typer import Option

from ..errors import UsageError, check_option
from ..rope_types import LONGEST
from .options import (
    LARGEST,
    Context,
    Factor,
    Force,
    Json,
    KvBits,
    KvRotate,
    Memory,
    Model,
    file,
    integers,
    kv_format,
    names,
    path,
)
from .output import check_outputs, count_bar, print_json, stdout

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..evaluation.answers import Answers
    from ..run_log import Record

MOST_EXAMPLES = 10**6
FILE: dict[str, Any] = file | {"metavar": "FILE.jsonl"}
OUTPUT: dict[str, Any] = path | {"metavar": "FILE.jsonl"}
Data = Annotated[list[Path], Option(**FILE, help="File of a task; may be given several times.")]
Output = Annotated[Path, Option(**OUTPUT, help="Run log of the answers, from which a killed run resumes.")]
MaxTokens = Annotated[
    int | None, Option(min=1, max=LARGEST, help="Maximum number of tokens of an answer. Default: the benchmark's.")
]
Limit = Annotated[int | None, Option(min=1, max=LARGEST, help="Ask only the first N questions of each task.")]
Truncation = Annotated[Literal["words", "head", "middle"], Option(help="How to cut long prompts.")]
NoChat = Annotated[bool, Option("--ignore-chat-template", help="Ask without the tokenizer's chat template.")]


def _of_files(name: str, cut: Literal["words", "middle"], summary: str) -> Callable[..., None]:
    """The command of a benchmark that comes as files."""

    def command(
        model: Model, data: Data, output: Output, context: Context = None, max_tokens: MaxTokens = None,
        limit: Limit = None, truncation: Truncation = cut, ignore_chat_template: NoChat = False,
        factor: Factor = None, kv_bits: KvBits = None, kv_rotate: KvRotate = False, memory: Memory = None,
        force: Force = False, json: Json = False,
    ) -> None:  # fmt: skip
        from ..checkpoint import Checkpoint
        from ..evaluation.context import choose_context

        check_outputs(output)
        checkpoint = Checkpoint.open(model, factor=factor)
        kv_bits = kv_format(kv_bits, kv_rotate)
        tokens = choose_context(checkpoint, context, kv_bits=kv_bits, memory=memory, force=force)
        benchmark = importlib.import_module(f"mlx_resonance.evaluation.{name}")
        ask_files(
            benchmark, checkpoint, data, output, json, context=tokens, truncation=truncation,
            chat=not ignore_chat_template, max_tokens=max_tokens, limit=limit, kv_bits=kv_bits,
        )  # fmt: skip

    command.__doc__ = summary
    return command


leval = _of_files("leval", "words", "Questions of L-Eval on long documents, except those for a judge.")
longbench = _of_files("longbench", "middle", "Tasks of LongBench, except three in Chinese.")


def ruler(
    model: Model,
    output: Output,
    lengths: Annotated[Sequence[int], Option(**integers(1, LONGEST), help="Tokens of prompt and answer.")] = (4096,),
    tasks: Annotated[Sequence[str] | None, Option(**names, help="Default: all but qa_1 and qa_2.")] = None,
    samples: Annotated[int, Option(min=1, max=10_000, help="Examples of each task at each length.")] = 20,
    seed: Annotated[int, Option(min=0, max=LARGEST, help="Seed of the examples.")] = 42,
    haystack: Annotated[
        Path | None, Option(**file, metavar="FILE.txt", help="Text to hide needles in. Default: random words.")
    ] = None,
    data: Annotated[
        list[Path] | None, Option(**FILE, help="Ask what RULER has made instead, e.g. qa_1/validation.jsonl.")
    ] = None,
    max_tokens: MaxTokens = None,
    ignore_chat_template: NoChat = False,
    factor: Factor = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Tasks of RULER, made here at any length, or its files."""
    from ..checkpoint import Checkpoint
    from ..evaluation import ruler_runs as benchmark
    from ..evaluation.answers import Answers
    from ..evaluation.context import choose_context

    check_outputs(output)
    for option, value in (("tasks", tasks), ("haystack", haystack)):
        if data and value is not None:
            raise UsageError(f"{option} is for examples that are made here, not for RULER's files", option=option)
    chosen: dict[str, Any] = {} if tasks is None else {"tasks": tasks}
    chosen |= {} if haystack is None else {"essay": benchmark.read_essay(haystack)}
    options: dict[str, Any] = {"chat": not ignore_chat_template, "max_tokens": max_tokens}
    grid = benchmark.RulerGrid(lengths=lengths, samples=samples, seed=seed, **options, **chosen)
    most = MOST_EXAMPLES // (len(lengths) * len(grid.tasks))
    wanted = f"at most {most}, which are a million examples of all tasks and lengths"
    check_option("samples", samples <= most, wanted, samples)
    checkpoint = Checkpoint.open(model, factor=factor)
    kv_bits = kv_format(kv_bits, kv_rotate)
    context = choose_context(checkpoint, max(lengths), kv_bits=kv_bits, memory=memory, force=force)
    if data:
        options |= {"context": context, "truncation": "head", "limit": None, "kv_bits": kv_bits}
        ask_files(benchmark, checkpoint, data, output, json, **options)
        return
    benchmark.check_lengths(checkpoint.tokenizer, grid)
    answers = Answers(benchmark.KIND, checkpoint, output, grid.settings(checkpoint.tokenizer), kv_bits)
    with count_bar() as bar:
        lines = benchmark.run_ruler(answers, grid, _advance(bar, len(grid.cells())))
    show(benchmark.summary(lines), answers, context, len(lines), json)


def ask_files(
    benchmark: Any, checkpoint: Checkpoint, data: list[Path], output: Path, json: bool, *, context: int,
    truncation: str, chat: bool, max_tokens: int | None, limit: int | None, kv_bits: Any,
) -> None:  # fmt: skip
    """Ask the questions of a benchmark's files, and show the scores."""
    from ..evaluation.answers import Answers
    from ..evaluation.prompts import Limits, check_fits
    from ..wired import wired

    tokenizer, asked = checkpoint.tokenizer, Counter[str]()
    limits = Limits(context, truncation, chat and tokenizer.has_chat_template)
    prompts = []
    for prompt in benchmark.make_prompts(data, max_tokens):
        asked[prompt.task] += 1
        if limit is None or asked[prompt.task] <= limit:
            check_fits(tokenizer, prompt, limits)  # refused now, not after hours
            prompts.append(prompt)
    settings = {"context": context, "truncation": truncation, "chat_template": limits.chat, "max_tokens": max_tokens}
    answers = Answers(benchmark.KIND, checkpoint, output, settings, kv_bits)
    with count_bar() as bar, wired():
        advance, lines = _advance(bar, len(prompts)), []
        for prompt in prompts:
            lines.append(answers.ask(prompt, limits))
            advance(lines[-1])
    show(benchmark.summary(lines), answers, context, len(lines), json)


def _advance(bar: Any, total: int) -> Callable[[Record], None]:
    task = bar.add_task("", total=total)
    return lambda line: bar.update(task, advance=1, description=line["task"])


def show(rows: list[Record], answers: Answers, context: int, count: int, json: bool) -> None:
    """Print the scores of tasks as a table, or as a JSON object."""
    from ..generation.kv_format import KVFormat

    mean = round(fmean(row["score"] for row in rows), 2)
    if json:
        result = {"output": str(answers.log.path), "answers": count, "score": mean, "results": rows}
        settings = answers.checkpoint.settings(KVFormat.of(answers.kv_bits).value)
        print_json(result | {"model": answers.checkpoint.name} | settings)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("task", "length", "n", "cut", "score"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        figures = (row.get("length", context), row["n"], row["truncated"], f"{row['score']:.2f}")
        table.add_row(f"{row['task']} ({row['metric']})", *map(str, figures))
    table.add_row("mean", "", "", "", f"{mean:.2f}")
    stdout.print(table)
