"""Perplexity on long documents as YaRN's authors measure it, at several contexts, for several rope settings.

A window of a context of C tokens is the tokenizer's start token (BOS) and C - 1 tokens of the document; without a
start token, as in Qwen, it is C tokens, and the first token of the document cannot be scored. The start token is at
position 0 of every window, so the k-th token of a window (counting from 1) is predicted at position k - 1, from the
start token and the k - 1 tokens before it; no other window is seen.

Sliding: windows begin every `stride` tokens; the first one scores all of its C - 1 tokens, the first of them given the
start token only; each later window scores its new tokens. A document shorter than a window is one short window.
Truncated: a document's first C - 1 tokens are its only window; documents that do not fill the longest context are left
out, so that all contexts are measured on the same documents.

`perplexity_windows` is exp of the mean of the windows' mean losses, in which each window counts the same, however few
tokens it scores: the published figure. `perplexity_tokens` is exp of the mean over tokens. `perplexity_last` is exp of
the mean over the last tokens of truncated windows: it shows far positions, the other two show mostly near ones.
`longppl` is exp of the mean over the key tokens of truncated windows, which an evaluator picks (key_tokens.py).

Source: jquesnelle/yarn `eval/perplexity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from ..attention import set_rope
from ..checkpoint import Checkpoint
from ..errors import ANOTHER, Remedy, UsageError, check_option
from ..generation.kv_format import KVFormat
from ..rope_config import RopeConfig
from ..run_log import Record, RunLog
from ..scaling import check_context, factor_for
from ..wired import wired
from .key_tokens import find_key_tokens, tokens_to_read
from .windows import Document, Job, Options, Protocol, sums

KIND = "perplexity"
FIELDS = {"digest": str, "context": int, "document": int} | {
    "windows": int, "tokens": int, "nll": float, "window_mean_sum": float,
}  # fmt: skip
LAST = {"last_tokens": int, "last_nll": float}  # of truncated windows
KEYS = {"key_tokens": int, "key_nll": float}  # with an evaluator
KEY = ("digest", "context", "document")  # the digest is of the checkpoint, the rope settings and the KV format
LARGEST = 700  # nats of a mean loss, beyond which exp overflows
Progress = Callable[[str, int, int], None]
Places = dict[int, NDArray[np.int64]]


@dataclass(frozen=True)
class Subject:
    """A checkpoint to measure, the rope settings and documents to measure it with, its start token or nothing."""

    checkpoint: Checkpoint
    ropes: Sequence[RopeConfig]
    start: list[int]
    documents: Sequence[Document]


def check_contexts(name: str, rope: RopeConfig, contexts: Sequence[int], evaluator: bool = False) -> None:
    """Raise UsageError where a context exceeds that of the rope settings, with what would cover it.

    An `evaluator` is measured as it is, so that another one has to be chosen.
    """
    longest = max(contexts)
    try:
        check_context(rope, longest, f"{name}, {rope.rope_type}: {longest} tokens")
    except UsageError as error:
        ways: Sequence[Remedy] = error.remedies
        if evaluator:
            ways = ({"evaluator": ANOTHER},)
        elif rope.base_type == "default":  # which has no factor of its own
            ways = ({"rope": "resonance_yarn", "factor": factor_for(rope, longest)}, {"extend": "dynamic"})
        raise UsageError(error.message, remedies=[*ways, {"beyond": True}]) from None


def select_documents(
    texts: Iterable[str], tokenizer: TokenizerWrapper, minimum: int, count: int | None
) -> tuple[list[Document], int]:
    """The first `count` documents of at least `minimum` tokens, and the number of shorter ones that were skipped.

    Raises:
        UsageError: none is long enough, or the count is not positive.
    """
    check_option("documents", count is None or count >= 1, "at least 1", count)
    chosen, longest, number = [], 0, 0
    for number, text in enumerate(texts, 1):
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        longest = max(longest, len(tokens))
        if len(tokens) >= minimum:
            chosen.append(Document(number, tokens))
            if len(chosen) == count:
                break
    if not chosen:
        raise UsageError(
            f"nothing is left to score: none of {number} documents has {minimum} tokens, the longest has {longest}",
            remedies=[{"min_tokens": ANOTHER}, {"contexts": ANOTHER}],
        )
    return chosen, number - len(chosen)


@wired()
def run_perplexity(
    subjects: Sequence[Subject],
    protocol: Protocol,
    output: Path,
    settings: Record,
    options: Options | None = None,
    progress: Progress | None = None,
    evaluator: Subject | None = None,
) -> list[Record]:
    """Measure every checkpoint, with every rope, at every context, on every document that has no result in the run log.

    Where angles do not depend on the length of a text, the losses of a truncated window begin with those of every
    shorter context: one pass over the longest context gives all of them.

    Args:
        subjects: what to measure.
        protocol: what to score.
        output: the file of the run log, one line per checkpoint, rope, context and document.
        settings: what the results have in common, besides the protocol and kv_bits.
        options: how to compute.
        progress: called with a label, the number of tokens read and their total under this label.
        evaluator: picks the key tokens of truncated windows, on which all checkpoints are also scored separately.

    Returns:
        One summary, as of `summarize`, per checkpoint, rope and context.

    Raises:
        UsageError: the file is of other settings, a line of it is not a result, a checkpoint does not fit one of its
            rope settings, or a loss is not a number.
        OSError: the file cannot be written.
    """
    variants = [(subject, [subject.checkpoint.with_rope(rope) for rope in subject.ropes]) for subject in subjects]
    options = options or Options()
    if evaluator is not None:
        check_evaluator(evaluator, subjects, protocol)
    settings = settings | protocol.settings() | {"kv_bits": KVFormat.of(options.kv_bits).value}
    settings["evaluator"] = None if evaluator is None else evaluator.checkpoint.results_digest(settings["kv_bits"])
    fields = FIELDS | (LAST if protocol.truncate else {}) | (KEYS if evaluator is not None else {})
    log = RunLog(output, KIND, settings, key=KEY, fields=fields)
    keys = {} if evaluator is None else pick_key_tokens(evaluator, protocol, options, log, progress)
    summaries = []
    for subject, checkpoints in variants:
        model = None
        for checkpoint in checkpoints:
            rope, digest = checkpoint.rope, checkpoint.results_digest(KVFormat.of(options.kv_bits).value)
            about = {"model": checkpoint.name, "rope": rope.name, "factor": rope.parameters.get("factor")}
            jobs = make_jobs(subject, rope, digest, protocol, options, log, keys)
            count = _counter(f"{checkpoint.name} {rope.name}", sum(job.tokens for job in jobs), progress)
            for job in jobs:
                model = model or checkpoint.load()
                set_rope(model, rope)
                measured = job.measure(model, count)
                lines = [about | _line(digest, *place, counts) for place, counts in measured.items()]
                log.append(*(line for line in lines if (digest, line["context"], line["document"]) not in log))
            for context in sorted(protocol.contexts):
                numbers = [document.number for document in subject.documents]
                found = [line for n in numbers if (line := log.find(digest, context, n)) is not None]
                summaries.append(about | {"context": context} | summarize(found))
    return summaries


def check_evaluator(evaluator: Subject, subjects: Sequence[Subject], protocol: Protocol) -> None:
    """Raise UsageError where an evaluator cannot pick the tokens that other checkpoints are scored on."""
    if not protocol.truncate:
        raise UsageError("key tokens are picked in one window per document", remedies=[{"truncate": True}])
    name, room = evaluator.checkpoint.name, max(protocol.contexts) - len(evaluator.start)
    wanted = [(number, tokens[:room].tolist()) for number, tokens in evaluator.documents]
    for subject in subjects:
        found = [(number, tokens[:room].tolist()) for number, tokens in subject.documents]
        if (subject.start, found) != (evaluator.start, wanted):
            other = subject.checkpoint.name
            raise UsageError(f"{name} and {other} read the documents as different tokens", option="evaluator")


def pick_key_tokens(
    evaluator: Subject, protocol: Protocol, options: Options, log: RunLog, progress: Progress | None
) -> Places:
    """The key tokens of each document within the longest context, from the run log or from the evaluator.

    A line of the log has the evaluator's own sums, too, under a digest that no model has.
    """
    checkpoint, context, model, places = evaluator.checkpoint, max(protocol.contexts), None, Places()
    digest = f"evaluator {checkpoint.results_digest(KVFormat.of(options.kv_bits).value)}"
    missing = [document for document in evaluator.documents if (digest, context, document.number) not in log]
    count = _counter(f"{checkpoint.name} evaluates", len(missing) * tokens_to_read(context), progress)
    for number, ids in evaluator.documents:
        line = log.find(digest, context, number)
        if line is None:
            model = model or checkpoint.load()
            tokens = np.concatenate([np.array(evaluator.start, np.int32), ids])[:context]
            key, losses = find_key_tokens(model, tokens, count, step=options.step, kv_bits=options.kv_bits)
            line = _line(digest, context, number, sums([losses], protocol.last, key)) | {"places": key.tolist()}
            log.append({"model": checkpoint.name} | line)
        places[number] = np.array(line["places"], np.int64)
    return places


def make_jobs(
    subject: Subject,
    rope: RopeConfig,
    digest: str,
    protocol: Protocol,
    options: Options,
    log: RunLog,
    keys: Places,
) -> list[Job]:
    """The missing work, in the order of the contexts; a resumed run has the same batches."""
    contexts, documents = sorted(protocol.contexts), subject.documents
    together = [contexts] if protocol.truncate and not rope.depends_on_length else [[context] for context in contexts]
    jobs = []
    for group in together:
        size = options.batch(group[-1]) if protocol.truncate else 1
        for batch in (documents[i : i + size] for i in range(0, len(documents), size)):
            left = [c for c in group if any((digest, c, document.number) not in log for document in batch)]
            if left:
                jobs.append(Job(batch, left, subject.start, protocol, options, keys))
    return jobs


def summarize(lines: Sequence[Record]) -> Record:
    """The perplexities of some documents, and their counts.

    `perplexity_last` is None for sliding windows, `longppl` without an evaluator or without key tokens.
    """

    def total(name: str) -> float:
        return math.fsum(line.get(name, 0) for line in lines)

    return {
        "documents": len(lines),
        "windows": int(total("windows")),
        "tokens": int(total("tokens")),
        "perplexity_windows": math.exp(total("window_mean_sum") / total("windows")),
        "perplexity_tokens": math.exp(total("nll") / total("tokens")),
        "perplexity_last": math.exp(total("last_nll") / total("last_tokens")) if "last_nll" in lines[0] else None,
        "longppl": math.exp(total("key_nll") / total("key_tokens")) if total("key_tokens") else None,
        "key_tokens": int(total("key_tokens")),
    }


def _line(digest: str, context: int, number: int, counts: Record) -> Record:
    """A line of the run log. Raises UsageError where the loss is not a number, or too large for exp."""
    if not counts["nll"] <= LARGEST * counts["tokens"]:  # NaN included
        raise UsageError(
            f"the loss of document {number} at {context} tokens is {counts['nll'] / counts['tokens']} nats per token: "
            "the weights are damaged, or need another type"
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
