"""`mlx-resonance eval perplexity`: how well a model predicts long documents, by context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Option

from ..rope_types import LONGEST
from .options import (
    LARGEST,
    Extend,
    Factor,
    Force,
    Json,
    KvBits,
    KvRotate,
    Memory,
    PrefillStep,
    file,
    integers,
    kv_format,
    names,
    path,
)
from .options import model as model_parser
from .output import check_outputs, draw, print_json, progress_bar, stderr, stdout

WIDTH = 100  # of the table with all columns

if TYPE_CHECKING:
    from ..evaluation.perplexity import Subject
    from ..evaluation.windows import Options, Protocol


def command(
    model: Annotated[
        list[str],
        Option("-m", "--model", **model_parser, help="Folder or Hugging Face hub id; several are compared."),
    ],
    data: Annotated[
        list[Path], Option(**file, metavar="FILE", help="Text, JSON lines or parquet; may be given several times.")
    ],
    contexts: Annotated[Sequence[int], Option(**integers(2, LONGEST), help="Tokens of a window.")],
    output: Annotated[
        Path, Option(**path, metavar="FILE.jsonl", help="Run log of the results, from which a killed run resumes.")
    ],
    field: Annotated[str, Option(help="Where JSON lines or parquet have the text.")] = "text",
    documents: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Measure only the first N documents. Default: all.")
    ] = None,
    min_tokens: Annotated[int, Option(min=1, max=LARGEST, help="Leave out shorter documents.")] = 1,
    truncate: Annotated[
        bool, Option("--truncate", help="One window per document; documents shorter than the longest are left out.")
    ] = False,
    stride: Annotated[int, Option(min=1, max=LARGEST, help="Tokens between the beginnings of sliding windows.")] = 256,
    last: Annotated[
        int, Option(min=1, max=LARGEST, help="Score the last N tokens of a truncated window separately, too.")
    ] = 512,
    evaluator: Annotated[
        str | None, Option(**model_parser, help="Checkpoint that picks the tokens of LongPPL, with --truncate.")
    ] = None,
    rope: Annotated[
        Sequence[str] | None,
        Option(**names, help="default, linear, ntk, dynamic, yarn, each also resonance_…. Default: config.json's."),
    ] = None,
    factor: Factor = None,
    extend: Extend = None,
    beyond: Annotated[
        bool, Option("--beyond", help="Measure contexts longer than the checkpoint is meant for.")
    ] = False,
    batch_size: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Windows read together. Default: as many as fit into one pass.")
    ] = None,
    prefill_step_size: PrefillStep = 2048,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    force: Force = False,
    plot: Annotated[
        Path | None, Option(**path, metavar="FILE.png", help="Draw the perplexity over the context.")
    ] = None,
    json: Json = False,
) -> None:
    """Perplexity on local documents.

    As YaRN's authors measure it: in sliding windows, or one per document.
    """
    from ..evaluation.context import versions
    from ..evaluation.perplexity import run_perplexity
    from ..evaluation.texts import check_files, data_digest
    from ..evaluation.windows import Options, Protocol

    check_outputs(output, plot)
    protocol = Protocol(contexts, truncate, stride, last)
    options = Options(batch_size, prefill_step_size, kv_format(kv_bits, kv_rotate))
    check_files(data)
    chosen = {"field": field, "documents": documents, "min_tokens": min_tokens}
    limits = (options, beyond, memory, force)
    subjects = [_subject(name, data, chosen, protocol, rope, factor, extend, *limits) for name in dict.fromkeys(model)]
    picks = None if evaluator is None else _subject(evaluator, data, chosen, protocol, None, None, None, *limits, True)
    with progress_bar() as bar:
        task = bar.add_task("perplexity", total=None)
        rows = run_perplexity(
            subjects, protocol, output, {"data": data_digest(data, field)}, options,
            lambda label, done, total: bar.update(task, completed=done, total=total, description=label), picks,
        )  # fmt: skip
    if truncate and (fewer := [context - 1 for context in contexts if context <= last]):
        stderr.print(f"last {last}: windows have fewer tokens to score ({', '.join(map(str, fewer))})", soft_wrap=True)
    if plot is not None:
        from ..plots import plot_perplexity

        draw(plot_perplexity, sorted(contexts), {"": _curves(rows, len(subjects))}, path=plot)
    if json:
        about: dict[str, Any] = {
            "model": model,
            "rope": list(dict.fromkeys(row["rope"] for row in rows)),
            "evaluator": evaluator,
        }
        about |= {"context": list(contexts), "truncation": "end" if truncate else None, "chat_template": False}
        print_json({"output": str(output)} | protocol.settings() | about | {"version": versions(), "results": rows})
    else:
        _print(rows, protocol, keys=evaluator is not None)


def _subject(
    name: str, paths: list[Path], chosen: dict[str, Any], protocol: Protocol, ropes: Sequence[str] | None,
    factor: float | None, extend: str | None, options: Options, beyond: bool, memory: int | None, force: bool,
    evaluator: bool = False,
) -> Subject:  # fmt: skip
    """A checkpoint, its rope settings and its documents: all is checked, and no weight is read.

    Args:
        options: how much is read at once.
        evaluator: whether it picks the tokens of LongPPL, as it is: options for the others do not change it.
    """
    from ..checkpoint import Checkpoint
    from ..evaluation.perplexity import Subject, check_contexts, select_documents
    from ..evaluation.texts import read_documents
    from ..scaling import named_rope

    checkpoint = Checkpoint.open(name, factor=None if ropes is not None else factor)
    own = checkpoint.rope
    settings = [own] if ropes is None else [named_rope(own, rope, factor) for rope in ropes]
    longest = max(protocol.contexts)
    variants = [checkpoint.with_rope(rope).extended(extend, longest) for rope in settings]
    for variant in () if beyond else variants:
        check_contexts(name, variant.rope, protocol.contexts, evaluator)
    for variant in variants:  # a position map, which some may not need, keeps keys twice
        options.require_memory(variant, longest, memory, force)
    tokenizer = checkpoint.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    minimum = max(chosen["min_tokens"], protocol.shortest(len(start)))
    texts = read_documents(paths, chosen["field"])
    documents, skipped = select_documents(texts, tokenizer, minimum, chosen["documents"])
    if skipped:
        counts = f"{len(documents)} documents of at least {minimum} tokens, {skipped} shorter ones left out"
        stderr.print(f"{name}: {counts}", soft_wrap=True)
    most = max(len(document.tokens) for document in documents) + len(start)
    if most < longest:
        stderr.print(f"{name}: no document fills a window of more than {most} tokens", soft_wrap=True)
    return Subject(checkpoint, [variant.rope for variant in variants], start, documents)


def _curves(rows: list[dict[str, Any]], models: int) -> dict[str, list[float]]:
    """The published figure by rope, and by model if there are several."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        label = row["rope"] if models == 1 else f"{row['model']}, {row['rope']}"
        curves.setdefault(label, []).append(row["perplexity_windows"])
    return curves


def _print(rows: list[dict[str, Any]], protocol: Protocol, keys: bool) -> None:
    figures = {"windows": "by windows", "tokens": "by tokens"}
    if protocol.truncate:
        figures["last"] = f"last {protocol.last}"
    several = len({row["model"] for row in rows}) > 1
    table = Table(box=None, pad_edge=False)
    if several:
        table.add_column("model", overflow="fold")
    table.add_column("rope", no_wrap=True)
    for name in ("context", "documents", "tokens", *figures.values(), *(["LongPPL", "key tokens"] if keys else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        labels = (row["model"], row["rope"]) if several else (row["rope"],)
        counts = (str(row[name]) for name in ("context", "documents", "tokens"))
        shown = [f"{row[f'perplexity_{name}']:.3f}" for name in figures]
        if keys:
            shown += ["" if row["longppl"] is None else f"{row['longppl']:.3f}", str(row["key_tokens"])]
        table.add_row(*labels, *counts, *shown)
    Console(highlight=False, markup=False, width=max(stdout.width, WIDTH)).print(table)
