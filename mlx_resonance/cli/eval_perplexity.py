"""`mlx-resonance eval perplexity`: how well a model foresees long documents, by context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from .options import Factor, Force, Json, KvBits, Memory, memory_bytes, whole_numbers
from .output import print_json, progress_bar, stderr, stdout

if TYPE_CHECKING:
    from ..evaluation.perplexity import Subject
    from ..evaluation.windows import Options, Protocol


def command(
    model: Annotated[list[str], Option(help="Folder or Hugging Face hub id; give several to compare them.")],
    data: Annotated[list[Path], Option(metavar="FILE", help="Text, JSON lines or parquet; give several for more.")],
    contexts: Annotated[str, Option(help="Tokens of a window, with commas.")],
    output: Annotated[Path, Option(metavar="FILE.jsonl", help="A line per document; what is there is not redone.")],
    field: Annotated[str, Option(help="Of JSON lines or parquet: where the text is.")] = "text",
    documents: Annotated[int | None, Option(help="Take so many, the first ones. Default: all.")] = None,
    min_tokens: Annotated[int, Option(help="Leave out shorter documents.")] = 1,
    truncate: Annotated[
        bool, Option("--truncate", help="One window per document; those shorter than the longest are left out.")
    ] = False,
    stride: Annotated[int, Option(help="Tokens between the beginnings of sliding windows.")] = 256,
    last: Annotated[int, Option(help="Of a truncated window, score so many at its end by themselves as well.")] = 512,
    rope: Annotated[
        str | None,
        Option(help="default, linear, ntk, dynamic, yarn, each also resonance_…, with commas. Default: config.json's."),
    ] = None,
    factor: Factor = None,
    beyond: Annotated[
        bool, Option("--beyond", help="Measure contexts longer than the checkpoint is meant for.")
    ] = False,
    batch_size: Annotated[int | None, Option(help="Windows read together. Default: short ones, 2048 tokens.")] = None,
    prefill_step_size: Annotated[int, Option(help="Most tokens in one pass.")] = 2048,
    kv_bits: KvBits = None,
    memory: Memory = None,
    force: Force = False,
    plot: Annotated[Path | None, Option(metavar="FILE.png", help="Draw the perplexity over the context.")] = None,
    json: Json = False,
) -> None:
    """Perplexity on local documents.

    As YaRN's authors measure it: in sliding windows, or one per document.
    """
    from ..evaluation.perplexity import run_perplexity
    from ..evaluation.texts import check_files, data_digest
    from ..evaluation.windows import Options, Protocol
    from ..files import user_path

    if plot is not None:
        from ..plots import image_path, plot_perplexity

        image_path(plot)  # refused now, not after hours
    protocol = Protocol(whole_numbers("perplexity", "--contexts", contexts), truncate, stride, last)
    options = Options(batch_size, prefill_step_size, kv_bits)
    size = memory_bytes(memory)
    paths = [user_path(path) for path in data]
    check_files(paths)
    chosen = {"field": field, "documents": documents, "min_tokens": min_tokens}
    names = None if rope is None else _names(rope)
    subjects = [
        _subject(name, paths, chosen, protocol, options, names, factor, beyond, size, force)
        for name in dict.fromkeys(model)
    ]
    with progress_bar() as bar:
        task = bar.add_task("perplexity", total=None)
        rows = run_perplexity(
            subjects, protocol, user_path(output), {"data": data_digest(paths, field)}, options,
            lambda label, done, total: bar.update(task, completed=done, total=total, description=label),
        )  # fmt: skip
    if plot is not None:
        plot_perplexity(sorted(protocol.contexts), {"": _curves(rows, len(subjects))}, plot)
        stderr.print(f"wrote {plot}")
    if json:
        print_json({"output": str(output)} | protocol.header() | {"results": rows})
    else:
        _print(rows, protocol)


def _subject(
    name: str, paths: list[Path], chosen: dict[str, Any], protocol: Protocol, options: Options,
    ropes: list[str] | None, factor: float | None, beyond: bool, memory: int | None, force: bool,
) -> Subject:  # fmt: skip
    """A checkpoint, its settings and its documents; everything that can be refused is, and no weight is read."""
    from ..evaluation.perplexity import Subject, check_contexts, named_rope, select_documents
    from ..evaluation.texts import read_documents
    from ..files import TOKENIZER_PATTERNS, WEIGHTS, read_config, resolve
    from ..loading import load_tokenizer
    from ..rope_config import RopeConfig
    from ..scaling import rescale

    folder = resolve(name, None, [*TOKENIZER_PATTERNS, WEIGHTS])
    config = read_config(folder)
    own = RopeConfig.from_hf(config)
    own = own if factor is None or ropes is not None else rescale(own, factor)
    settings = [own] if ropes is None else [named_rope(own, rope, factor) for rope in ropes]
    for rope in () if beyond else settings:
        check_contexts(name, rope, protocol.contexts)
    if not force:
        options.guard(folder, max(protocol.contexts), memory)
    tokenizer = load_tokenizer(folder, config)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    minimum = max(chosen["min_tokens"], protocol.shortest(len(start)))
    texts = read_documents(paths, chosen["field"])
    documents, skipped = select_documents(texts, tokenizer, minimum, chosen["documents"])
    if skipped:
        counts = f"{len(documents)} documents of at least {minimum} tokens, {skipped} shorter ones left out"
        stderr.print(f"{name}: {counts}", soft_wrap=True)
    longest = max(len(document.tokens) for document in documents) + len(start)
    if longest < max(protocol.contexts):
        stderr.print(f"{name}: no document fills a window of more than {longest} tokens", soft_wrap=True)
    return Subject(name, folder, settings, start, documents)


def _curves(rows: list[dict[str, Any]], models: int) -> dict[str, list[float]]:
    """The published figure by rope, and by model where there are several."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        label = row["rope"] if models == 1 else f"{row['model']}, {row['rope']}"
        curves.setdefault(label, []).append(row["perplexity_windows"])
    return curves


def _print(rows: list[dict[str, Any]], protocol: Protocol) -> None:
    figures = {"windows": "by windows", "tokens": "by tokens"}
    if protocol.truncate:
        figures["last"] = f"last {protocol.last}"
    several = len({row["model"] for row in rows}) > 1
    table = Table(box=None, pad_edge=False)
    if several:
        table.add_column("model", overflow="fold")
    table.add_column("rope", no_wrap=True)
    for name in ("context", "documents", "tokens", *figures.values()):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        names = (row["model"], row["rope"]) if several else (row["rope"],)
        counts = (str(row[name]) for name in ("context", "documents", "tokens"))
        table.add_row(*names, *counts, *(f"{row[f'perplexity_{name}']:.3f}" for name in figures))
    stdout.print(table)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))
