"""`mlx-resonance eval leval`, `longbench`, `ruler`: tasks with long texts, answered greedily, and scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from .options import Context, Factor, Force, Json, KvBits, Memory, Model, memory_bytes, whole_numbers
from .output import count_bar, print_json, stdout

if TYPE_CHECKING:
    from ..evaluation.checkpoint import Checkpoint
    from ..records import Record

Data = Annotated[list[Path], Option(metavar="FILE.jsonl", help="A task's file; give several for more.")]
Output = Annotated[Path, Option(metavar="FILE.jsonl", help="The answers; what is there is not asked again.")]
MaxTokens = Annotated[int | None, Option(help="Most tokens of an answer. Default: the benchmark's, by task.")]
Limit = Annotated[int | None, Option(help="Ask so many questions of each task, the first ones.")]
Truncation = Annotated[str, Option(help="Of what is too long: words, head or middle.")]
NoChat = Annotated[bool, Option("--ignore-chat-template", help="Ask without the tokenizer's chat template.")]


def leval(
    model: Model, data: Data, output: Output, context: Context = None, max_tokens: MaxTokens = None,
    limit: Limit = None, truncation: Truncation = "words", ignore_chat_template: NoChat = False,
    factor: Factor = None, kv_bits: KvBits = None, memory: Memory = None, force: Force = False, json: Json = False,
) -> None:  # fmt: skip
    """Questions of L-Eval on long documents, but for a judge's."""
    from ..evaluation import leval as benchmark

    checkpoint = _checkpoint("leval", model, context, factor, kv_bits, memory, force)
    limits = {"max_tokens": max_tokens, "limit": limit}
    _ask_files(benchmark, checkpoint, data, output, limits, truncation, not ignore_chat_template, json)


def longbench(
    model: Model, data: Data, output: Output, context: Context = None, max_tokens: MaxTokens = None,
    limit: Limit = None, truncation: Truncation = "middle", ignore_chat_template: NoChat = False,
    factor: Factor = None, kv_bits: KvBits = None, memory: Memory = None, force: Force = False, json: Json = False,
) -> None:  # fmt: skip
    """Tasks of LongBench, but for three in Chinese."""
    from ..evaluation import longbench as benchmark

    checkpoint = _checkpoint("longbench", model, context, factor, kv_bits, memory, force)
    limits = {"max_tokens": max_tokens, "limit": limit}
    _ask_files(benchmark, checkpoint, data, output, limits, truncation, not ignore_chat_template, json)


def ruler(
    model: Model,
    output: Output,
    lengths: Annotated[str, Option(help="Tokens of prompt and answer, with commas.")] = "4096",
    tasks: Annotated[str | None, Option(help="With commas. Default: all that are made here.")] = None,
    samples: Annotated[int, Option(help="Examples of each task at each length.")] = 20,
    seed: Annotated[int, Option(help="Of the examples.")] = 42,
    haystack: Annotated[
        Path | None, Option(metavar="FILE.txt", help="Essays to hide needles in. Default: made of random words.")
    ] = None,
    data: Annotated[
        list[Path] | None, Option(metavar="FILE.jsonl", help="Ask what RULER has made, such as qa_1/validation.jsonl.")
    ] = None,
    max_tokens: MaxTokens = None,
    ignore_chat_template: NoChat = False,
    factor: Factor = None,
    kv_bits: KvBits = None,
    memory: Memory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Tasks of RULER, made here at any length, or its files."""
    from ..evaluation import ruler_runs as benchmark
    from ..evaluation.answers import Answers
    from ..files import user_path

    numbers = whole_numbers("ruler", "--lengths", lengths)
    if data:
        checkpoint = _checkpoint("ruler", model, max(numbers), factor, kv_bits, memory, force)
        limits = {"max_tokens": max_tokens, "limit": None}
        _ask_files(benchmark, checkpoint, data, output, limits, "head", not ignore_chat_template, json)
        return
    essay = {} if haystack is None else {"essay": benchmark.read_essay(user_path(haystack))}
    names = {} if tasks is None else {"tasks": [name.strip() for name in tasks.split(",")]}
    _check_positive("ruler", {"max_tokens": max_tokens})
    grid = benchmark.Grid(
        lengths=numbers, samples=samples, seed=seed, chat=not ignore_chat_template, max_tokens=max_tokens,
        **names, **essay,
    )  # fmt: skip
    checkpoint = _checkpoint("ruler", model, max(grid.lengths), factor, kv_bits, memory, force)
    benchmark.check_lengths(checkpoint.tokenizer, grid)
    answers = Answers("ruler", checkpoint, user_path(output), grid.header(checkpoint.tokenizer))
    with count_bar() as bar:
        lines = benchmark.run_ruler(answers, grid, _advance(bar, len(grid.cells())))
    _show(benchmark.summary(lines), checkpoint, output, len(lines), json)


def _checkpoint(
    kind: str, model: str, context: int | None, factor: float | None, kv_bits: int | None, memory: str | None,
    force: bool,
) -> Checkpoint:  # fmt: skip
    from ..evaluation.checkpoint import open_checkpoint

    size = memory_bytes(memory)
    return open_checkpoint(kind, model, context=context, factor=factor, kv_bits=kv_bits, memory=size, force=force)


def _ask_files(
    benchmark: Any, checkpoint: Checkpoint, data: list[Path], output: Path, limits: dict[str, int | None],
    truncation: str, chat: bool, json: bool,
) -> None:  # fmt: skip
    """Ask the questions of a benchmark's files, and show what the answers are worth."""
    from ..evaluation.answers import Answers
    from ..evaluation.prompts import Limits, check_fits
    from ..files import user_path

    kind, tokenizer = benchmark.KIND, checkpoint.tokenizer
    _check_positive(kind, limits)
    fitted = Limits(checkpoint.context, truncation, chat and tokenizer.has_chat_template)
    prompts, counts = [], dict[str, int]()
    for prompt in benchmark.make_prompts([user_path(path) for path in data], limits["max_tokens"]):
        counts[prompt.task] = counts.get(prompt.task, 0) + 1
        if limits["limit"] is None or counts[prompt.task] <= limits["limit"]:
            check_fits(kind, tokenizer, prompt, fitted)  # refused now, not after hours
            prompts.append(prompt)
    header = {"context": fitted.context, "truncation": truncation, "chat_template": fitted.chat}
    answers = Answers(kind, checkpoint, user_path(output), header | {"max_tokens": limits["max_tokens"]})
    with count_bar() as bar:
        advance, lines = _advance(bar, len(prompts)), []
        for prompt in prompts:
            lines.append(answers.ask(prompt, fitted))
            advance(lines[-1])
    _show(benchmark.summary(lines), checkpoint, output, len(lines), json)


def _advance(bar: Any, total: int) -> Callable[[Record], None]:
    task = bar.add_task("", total=total)
    return lambda line: bar.update(task, advance=1, description=line["task"])


def _show(rows: list[Record], checkpoint: Checkpoint, output: Path, count: int, json: bool) -> None:
    mean = round(fmean(row["score"] for row in rows), 2)
    if json:
        print_json({"output": str(output), "answers": count, "score": mean, "results": rows} | checkpoint.header)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("task", "length", "n", "cut", "score"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        figures = (row.get("length", checkpoint.context), row["n"], row["truncated"], f"{row['score']:.2f}")
        table.add_row(f"{row['task']} ({row['metric']})", *map(str, figures))
    table.add_row("mean", "", "", "", f"{mean:.2f}")
    stdout.print(table)


def _check_positive(kind: str, numbers: dict[str, int | None]) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"[{kind}] {name} must be at least 1, got {value}")
