"""Which windows of a document are read, and which of their tokens are scored: the protocol, its windows, its jobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import check_option
from ..generation.kv_format import KVBits, KVFormat
from ..generation.memory import require_memory
from ..generation.prefill import PREFILL_BATCH, STEP
from ..rope_types import LONGEST
from ..run_log import Record
from .losses import token_losses


@dataclass(frozen=True)
class Protocol:
    """What to score.

    Args:
        contexts: tokens of a window, start token included.
        truncate: one window per document instead of sliding ones.
        stride: tokens from the beginning of a sliding window to that of the next.
        last: number of tokens at the end of a truncated window that are also scored separately.

    Raises:
        UsageError: an argument is out of range.
    """

    contexts: Sequence[int]
    truncate: bool = False
    stride: int = 256
    last: int = 512

    def __post_init__(self) -> None:
        right = bool(self.contexts) and all(2 <= context <= LONGEST for context in self.contexts)
        check_option("contexts", right, "in [2, 2**31] tokens", list(self.contexts))
        most = min(self.contexts) - 1
        wanted = f"in [1, {most}], or tokens between windows are never scored"
        check_option("stride", self.truncate or 1 <= self.stride <= most, wanted, self.stride)
        check_option("last", self.last >= 1, "at least 1", self.last)

    def shortest(self, start: int) -> int:
        """Tokens that a document must have, if windows begin with `start` start tokens."""
        return max(self.contexts) - start if self.truncate else 2 - start

    def settings(self) -> Record:
        """What results must have in common; more contexts may follow."""
        return {"truncate": self.truncate} | ({"last": self.last} if self.truncate else {"stride": self.stride})


class Document(NamedTuple):
    """The number of a document in the data, which counts from 1, and its token ids without a start token."""

    number: int
    tokens: NDArray[np.int32]


@dataclass(frozen=True)
class Options:
    """How to compute. Only kv_bits changes results by more than rounding.

    Args:
        batch_size: windows read together; None for as many as fit into a chunk: more would not be faster.
        step: maximum number of tokens of a chunk, over all windows.
        kv_bits: format of the KV cache, as in `KVFormat.of`.

    Raises:
        UsageError: an argument is out of range.
    """

    batch_size: int | None = None
    step: int = STEP
    kv_bits: KVBits = None

    def __post_init__(self) -> None:
        check_option("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1", self.batch_size)
        check_option("prefill_step_size", self.step >= 1, "at least 1", self.step)
        KVFormat.of(self.kv_bits)

    def batch(self, context: int) -> int:
        """Number of windows of a context that are read together."""
        return self.batch_size or max(1, self.step // context)

    def require_memory(self, checkpoint: Checkpoint, context: int, memory: int | None, force: bool) -> None:
        """Raise UsageError where windows of a context do not fit into `memory` bytes; None for the device's limit."""
        windows = self.batch(context)
        parts = min(windows, PREFILL_BATCH)  # the plan counts the work of that many rows, which share a chunk here
        require_memory(
            checkpoint, context, force, kv_bits=self.kv_bits, memory=memory, sequences=windows,
            prefill_step_size=max(1, self.step // parts),
        )  # fmt: skip


class Window(NamedTuple):
    """A piece of a document that is read at once.

    Attributes:
        begin, end: of the piece, in tokens of the document.
        scored: number of its last tokens that no window before it had.
    """

    begin: int
    end: int
    scored: int


def sliding_windows(length: int, size: int, stride: int) -> list[Window]:
    """The windows of a document: one begins every `stride` tokens, until one reaches the end.

    The first window scores all of its tokens, each later one its new tokens: `stride` of them, or fewer in the last.
    A document of at most `size` tokens is a single window.

    Args:
        length: tokens of the document, at least 1.
        size: maximum number of tokens of a window.
        stride: tokens from the beginning of one to that of the next, at most `size`.

    Source: jquesnelle/yarn `eval/perplexity.py`, the loop of `compute_perplexity`.
    """
    windows: list[Window] = []
    end = 0
    for begin in range(0, length, stride):
        before, end = end, min(begin + size, length)
        windows.append(Window(begin, end, end - before))
        if end == length:
            break
    return windows


@dataclass(frozen=True)
class Job:
    """Documents and contexts that are measured together and written together.

    Args:
        documents: to measure; truncated windows need documents that fill the longest context.
        contexts: in rising order; several only if the losses of the longest window begin with those of the others.
        start: the start token, or nothing.
        protocol, options: what to score, and how to compute it.
        keys: places of a document's key tokens among the losses of its window, by its number.
    """

    documents: Sequence[Document]
    contexts: Sequence[int]
    start: list[int]
    protocol: Protocol
    options: Options
    keys: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)

    def batches(self) -> Iterator[list[tuple[Document, Window]]]:
        """Windows of the same shape, to be read together."""
        size = self.contexts[-1] - len(self.start)
        stride = size if self.protocol.truncate else self.protocol.stride
        pairs = []
        for document in self.documents:
            length = size if self.protocol.truncate else len(document.tokens)
            pairs += [(document, window) for window in sliding_windows(length, size, stride)]
        most = self.options.batch(self.contexts[-1])
        for _, same in groupby(pairs, key=lambda pair: (pair[1].end - pair[1].begin, pair[1].scored)):
            group = list(same)
            yield from (group[i : i + most] for i in range(0, len(group), most))

    @property
    def tokens(self) -> int:
        """Number of tokens to read."""
        return sum(w.end - w.begin + len(self.start) - 1 for batch in self.batches() for _, w in batch)

    def measure(self, model: nn.Module, on_tokens: Callable[[int], None]) -> dict[tuple[int, int], Record]:
        """The sums for each context and number of a document."""
        found: dict[int, list[NDArray[np.float32]]] = {document.number: [] for document in self.documents}
        options: dict[str, Any] = {"step": self.options.step, "kv_bits": self.options.kv_bits, "on_tokens": on_tokens}
        for batch in self.batches():
            rows = np.array([self.start + d.tokens[w.begin : w.end].tolist() for d, w in batch], np.int32)
            scored = min(batch[0][1].scored, rows.shape[1] - 1)
            for (document, _), losses in zip(batch, token_losses(model, rows, scored, **options), strict=True):
                found[document.number].append(losses)
        if not self.protocol.truncate:
            return {(self.contexts[0], number): sums(losses) for number, losses in found.items()}
        last = self.protocol.last
        return {
            (c, number): sums([losses[0][: c - 1]], last, self.keys.get(number))
            for number, losses in found.items()
            for c in self.contexts
        }


def sums(
    windows: Sequence[NDArray[np.float32]], last: int | None = None, key: NDArray[np.int64] | None = None
) -> Record:
    """The sums from which the perplexities of a document are computed.

    Args:
        windows: losses of the scored tokens of each window, in nats.
        last: number of tokens at the end of each window that are also summed separately.
        key: places of tokens of the only window that are also summed separately.
    """
    exact = [losses.astype(np.float64) for losses in windows]
    counts: Record = {
        "windows": len(exact),
        "tokens": sum(losses.size for losses in exact),
        "nll": math.fsum(losses.sum() for losses in exact),
        "window_mean_sum": math.fsum(losses.mean() for losses in exact),
    }
    if last is not None:
        counts["last_tokens"] = sum(losses[-last:].size for losses in exact)
        counts["last_nll"] = math.fsum(losses[-last:].sum() for losses in exact)
    if key is not None:
        inside = key[key < exact[0].size]
        counts |= {"key_tokens": inside.size, "key_nll": math.fsum(exact[0][inside])}
    return counts
