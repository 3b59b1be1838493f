"""Perplexity on long documents as YaRN's authors measure it, at several contexts, for several rope settings.

A window of a context of C tokens is the tokenizer's start token (BOS) and C - 1 tokens of the document; without a
start token, as in Qwen, it is C tokens, and the first one of the document cannot be scored. The start token stands at
position 0 of every window, so the k-th token of a window (from 1 on) is predicted at position k - 1 from the start
token and the k - 1 tokens before it; nothing of another window is seen.

Sliding: windows begin every `stride` tokens; the first one scores all of its C - 1 tokens, the first of them from the
start token alone, each later one the tokens that are new. Documents shorter than a window are one short window.
Truncated: a document's first C - 1 tokens are its only window; documents that do not fill the longest context are left
out, so that all contexts are measured on the same ones.

`perplexity_windows` is exp of the mean of the windows' mean losses, each window counting alike however few tokens it
scores: the published figure. `perplexity_tokens` is exp of the mean over tokens. `perplexity_last` is that of the last
tokens of truncated windows: it tells about far positions, where the others are mostly about near ones.

Source: jquesnelle/yarn `eval/perplexity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checks import check_checkpoint
from ..generation.prompt_cache import model_digest
from ..loading import load_model, set_rope
from ..records import Record, append_records, open_records
from ..rope_config import PREFIX, RopeConfig
from ..scaling import SCALINGS, factor_for, new_rope
from .texts import check_results
from .windows import Document, Job, Options, Protocol

KIND = "perplexity"
FIELDS = {"digest": str, "context": int, "document": int} | {
    "windows": int, "tokens": int, "nll": float, "window_mean_sum": float,
}  # fmt: skip
LAST = {"last_tokens": int, "last_nll": float}  # of truncated windows
LARGEST = 700  # nats of a mean loss, or exp is no number
Progress = Callable[[str, int, int], None]
Cell = tuple[str, int, int]  # the checkpoint's digest with a rope, the context, the document's number


@dataclass(frozen=True)
class Subject:
    """A checkpoint to measure.

    Args:
        name: as it was given.
        folder: where it is.
        ropes: the settings to measure it with.
        start: the start token, or nothing.
        documents: what to measure it on.
    """

    name: str
    folder: Path
    ropes: Sequence[RopeConfig]
    start: list[int]
    documents: Sequence[Document]


def named_rope(source: RopeConfig, name: str, factor: float | None) -> RopeConfig:
    """A checkpoint's settings with another scaling.

    Args:
        source: its own.
        name: `default` for no scaling, or one of `SCALINGS`; after `resonance_` the wavelengths are rounded.
        factor: of a scaling.

    Raises:
        ValueError: another name, or `new_rope` refuses it.
    """
    base = name.removeprefix(PREFIX)
    if base not in ("default", *SCALINGS):
        known = ", ".join(("default", *SCALINGS))
        raise ValueError(f"[perplexity] --rope must be some of {known}, each also {PREFIX}…, got {name!r}")
    if base == "default":
        return replace(source, rope_type=name, parameters={}, max_position_embeddings=source.trained_length)
    return new_rope(source, base, factor, None, name != base)


def check_contexts(name: str, rope: RopeConfig, contexts: Sequence[int]) -> None:
    """Raise ValueError where a context exceeds that of the settings, with what would cover it."""
    limit, longest = rope.context_length, max(contexts)
    if limit is not None and longest > limit:
        factor = factor_for(rope, longest)
        longer = "take another model" if factor is None else f"give --rope a scaling with --factor {factor}"
        raise ValueError(
            f"[perplexity] {longest} tokens exceed the context of {limit} that {name} has with rope type "
            f"{rope.rope_type}: {longer}, or --beyond to measure it all the same"
        )


def select_documents(
    texts: Iterable[str], tokenizer: TokenizerWrapper, minimum: int, count: int | None
) -> tuple[list[Document], int]:
    """The first documents that are long enough.

    Args:
        texts: of all documents; no more are read than are needed.
        tokenizer: from `load`.
        minimum: tokens that a document must have.
        count: how many to take; None for all.

    Returns:
        The documents, and how many shorter ones were passed over.

    Raises:
        ValueError: none is long enough, or none is wanted.
    """
    if count is not None and count < 1:
        raise ValueError(f"[perplexity] documents must be at least 1, got {count}")
    chosen, longest, number = [], 0, 0
    for number, text in enumerate(texts, 1):
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        longest = max(longest, len(tokens))
        if len(tokens) >= minimum:
            chosen.append(Document(number, tokens))
            if len(chosen) == count:
                break
    if not chosen:
        raise ValueError(
            f"[perplexity] nothing is left to score: none of {number} documents has {minimum} tokens, the longest has "
            f"{longest} (see --min-tokens; with --truncate all must fill the longest of --contexts)"
        )
    return chosen, number - len(chosen)


def run_perplexity(
    subjects: Sequence[Subject],
    protocol: Protocol,
    output: Path,
    header: Record,
    options: Options | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measure every checkpoint, with every rope, at every context, on every document that the file has no result of.

    Where angles do not depend on the length of a text, the losses of a truncated window begin with those of every
    shorter context: one pass over the longest gives all of them.

    Args:
        subjects: what to measure. Each is loaded once, and only if something of it is missing.
        protocol: what is scored.
        output: JSON lines, one per checkpoint, rope, context and document; a killed run goes on with them.
        header: what they have in common; the protocol and kv_bits are added.
        options: how to compute.
        progress: called with a label, the tokens that were read and those to be read under it.

    Returns:
        One summary, as of `summarize`, per checkpoint, rope and context.

    Raises:
        ValueError: the file is of other settings, a line of it is no result, a checkpoint cannot be right with one of
            its settings, or a loss is no number.
        OSError: the file cannot be written.
    """
    for subject in subjects:
        for rope in subject.ropes:
            check_checkpoint(subject.folder, rope)
    options = options or Options()
    header = header | protocol.header() | {"kv_bits": options.kv_bits}
    lines = open_records(output, KIND, header)
    check_results(KIND, output, lines, FIELDS | (LAST if protocol.truncate else {}))
    done: dict[Cell, Record] = {(line["digest"], line["context"], line["document"]): line for line in lines}
    summaries = []
    for subject in subjects:
        model = None
        for rope in subject.ropes:
            digest = model_digest(subject.folder, rope, options.kv_bits)
            about = {"model": subject.name, "rope": rope.rope_type, "factor": rope.parameters.get("factor")}
            jobs = make_jobs(subject, rope, digest, protocol, options, done)
            count = _counter(f"{subject.name} {rope.rope_type}", sum(job.tokens for job in jobs), progress)
            for job in jobs:
                model = load_model(subject.folder, rope=rope)[0] if model is None else model
                set_rope(model, rope)
                new = {(digest, *cell): counts for cell, counts in job.measure(model, count).items()}
                new = {cell: about | _line(cell, counts) for cell, counts in new.items() if cell not in done}
                append_records(output, list(new.values()))
                done |= new
            for context in sorted(protocol.contexts):
                of_context = [done[digest, context, document.number] for document in subject.documents]
                summaries.append(about | {"context": context} | summarize(of_context))
    return summaries


def make_jobs(
    subject: Subject, rope: RopeConfig, digest: str, protocol: Protocol, options: Options, done: Container[Cell]
) -> list[Job]:
    """The work that is not done, in the order of the contexts, and so cut that a killed run's is cut the same."""
    contexts, documents = sorted(protocol.contexts), subject.documents
    together = [contexts] if protocol.truncate and not rope.depends_on_length else [[context] for context in contexts]
    jobs = []
    for group in together:
        size = options.batch(group[-1]) if protocol.truncate else 1
        for batch in (documents[i : i + size] for i in range(0, len(documents), size)):
            left = [c for c in group if any((digest, c, document.number) not in done for document in batch)]
            if left:
                jobs.append(Job(batch, left, subject.start, protocol, options))
    return jobs


def summarize(lines: Sequence[Record]) -> Record:
    """The perplexities over some documents, and what they were counted over; `perplexity_last` is None for sliding."""

    def total(name: str) -> float:
        return math.fsum(line[name] for line in lines)

    return {
        "documents": len(lines),
        "windows": int(total("windows")),
        "tokens": int(total("tokens")),
        "perplexity_windows": math.exp(total("window_mean_sum") / total("windows")),
        "perplexity_tokens": math.exp(total("nll") / total("tokens")),
        "perplexity_last": math.exp(total("last_nll") / total("last_tokens")) if "last_nll" in lines[0] else None,
    }


def _line(cell: Cell, counts: Record) -> Record:
    """A line of the file. Raises ValueError where a loss is no number, or as good as none."""
    digest, context, number = cell
    if not counts["nll"] <= LARGEST * counts["tokens"]:  # NaN included
        raise ValueError(
            f"[perplexity] the loss of document {number} at {context} tokens is {counts['nll'] / counts['tokens']} "
            "nats per token: convert the checkpoint with another --dtype"
        )
    return {"digest": digest, "context": context, "document": number} | counts


def _counter(label: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(label, done, total)

    return count
