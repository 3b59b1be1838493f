"""What of a document is read at once and what of that is scored: the protocol, its windows, the work they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..generation.memory import guard
from ..generation.prefill import BUDGET, PREFILL_BATCH, STEP
from ..records import Record
from .losses import score


@dataclass(frozen=True)
class Protocol:
    """What is scored.

    Args:
        contexts: tokens of a window, start token included.
        truncate: one window per document instead of sliding ones.
        stride: tokens between the beginnings of sliding windows.
        last: tokens at the end of a truncated window that are scored by themselves as well.

    Raises:
        ValueError: an argument is out of range.
    """

    contexts: Sequence[int]
    truncate: bool = False
    stride: int = 256
    last: int = 512

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 2:
            raise ValueError(f"[perplexity] contexts must be at least 2 tokens, got {list(self.contexts)}")
        if not self.truncate and not 1 <= self.stride < min(self.contexts):
            raise ValueError(
                f"[perplexity] stride must lie in [1, {min(self.contexts) - 1}], or tokens between windows are never "
                f"scored, got {self.stride}"
            )
        if self.last < 1:
            raise ValueError(f"[perplexity] last must be at least 1, got {self.last}")

    def shortest(self, start: int) -> int:
        """Tokens that a document must have, `start` tokens of a window not counted: a truncated one all of a window."""
        return max(self.contexts) - start if self.truncate else 2 - start

    def header(self) -> Record:
        """What results must have in common; there may be more contexts later."""
        return {"truncate": self.truncate} | ({"last": self.last} if self.truncate else {"stride": self.stride})


class Document(NamedTuple):
    """The number of a document in the data, from 1 on, and its token ids without a start token."""

    number: int
    tokens: NDArray[np.int32]


@dataclass(frozen=True)
class Options:
    """How to compute, which changes results by rounding alone (but for kv_bits).

    Args:
        batch_size: windows read together; None for as many as fit into a chunk: more would be no faster.
        step: most tokens of a chunk, over all windows.
        kv_bits: keep keys and values in 4 or 8 bits.

    Raises:
        ValueError: an argument is out of range.
    """

    batch_size: int | None = None
    step: int = STEP
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"[perplexity] batch_size must be at least 1, got {self.batch_size}")
        if self.step < 1:
            raise ValueError(f"[perplexity] prefill_step_size must be at least 1, got {self.step}")
        if self.kv_bits not in (None, 4, 8):
            raise ValueError(f"[perplexity] kv_bits must be 4 or 8, got {self.kv_bits}")

    def batch(self, context: int) -> int:
        """Windows of a context that are read together."""
        return self.batch_size or max(1, self.step // context)

    def guard(self, folder: Path, context: int, memory: int | None) -> None:
        """Raise ValueError where windows of a context do not fit into so many bytes, None for what the device says."""
        windows = self.batch(context)
        parts = min(windows, PREFILL_BATCH)  # the plan counts the work of so many rows, ours share a chunk
        guard(
            folder, context, "perplexity", kv_bits=self.kv_bits, memory=memory, sequences=windows,
            prefill_step_size=max(1, self.step // parts), budget=BUDGET // parts,
        )  # fmt: skip


class Window(NamedTuple):
    """A piece of a document that is read at once.

    Attributes:
        begin, end: of the piece, in tokens of the document.
        scored: how many of its last tokens no window before it had.
    """

    begin: int
    end: int
    scored: int


def sliding_windows(length: int, size: int, stride: int) -> list[Window]:
    """The windows of a document: every `stride` tokens one begins, the first that reaches the end is the last.

    The first one scores all of its tokens, each later one those that are new: `stride` of them, the last what is left.
    A document of at most `size` tokens has a single window, which is all of it.

    Args:
        length: tokens of the document, at least 1.
        size: most tokens of a window.
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
    """Documents at contexts that are measured together and written together.

    Args:
        documents: to measure; all fill the longest context where windows are truncated.
        contexts: in rising order; several only where the losses of the longest window begin with those of the others.
        start: the start token, or nothing.
        protocol, options: how.
    """

    documents: Sequence[Document]
    contexts: Sequence[int]
    start: list[int]
    protocol: Protocol
    options: Options

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
        """How many are read."""
        return sum(w.end - w.begin + len(self.start) - 1 for batch in self.batches() for _, w in batch)

    def measure(self, model: nn.Module, on_tokens: Callable[[int], None]) -> dict[tuple[int, int], Record]:
        """The sums of each context and number of a document."""
        found: dict[int, list[NDArray[np.float32]]] = {document.number: [] for document in self.documents}
        options: dict[str, Any] = {"step": self.options.step, "kv_bits": self.options.kv_bits, "on_tokens": on_tokens}
        for batch in self.batches():
            rows = np.array([self.start + d.tokens[w.begin : w.end].tolist() for d, w in batch], np.int32)
            scored = min(batch[0][1].scored, rows.shape[1] - 1)
            for (document, _), losses in zip(batch, score(model, rows, scored, **options), strict=True):
                found[document.number].append(losses)
        if not self.protocol.truncate:
            return {(self.contexts[0], number): sums(losses) for number, losses in found.items()}
        last = self.protocol.last
        return {
            (c, number): sums([losses[0][: c - 1]], last) for number, losses in found.items() for c in self.contexts
        }


def sums(windows: Sequence[NDArray[np.float32]], last: int | None = None) -> Record:
    """What the figures of a document are computed from, given its windows' losses in nats.

    Args:
        windows: losses of the scored tokens of each.
        last: how many at the end of each also count by themselves.
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
    return counts
