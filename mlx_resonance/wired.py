"""Wired memory: while a model works, macOS keeps the GPU's memory resident; the last one to finish puts things back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .sizes import format_size

Stream: TypeAlias = "mx.Stream | mx.ThreadLocalStream"
LARGE = 0.9  # of what Metal recommends: from here on mlx-lm warns, too

logger = logging.getLogger("mlx_resonance")


@contextmanager
def wired(*streams: Stream, model: nn.Module | None = None) -> Iterator[None]:
    """Around a piece of work: let MLX wire as much memory as Metal recommends. Elsewhere nothing happens.

    The limit belongs to the process. Of pieces within each other, or at the same time, the first one to begin sets it;
    the last one to end waits for the GPU and restores what was there before.

    Args:
        streams: on which the work is done, besides the default one.
        model: for a warning where its weights are about as large as what Metal recommends.

    Source: mlx-lm `generate.py`, wired_limit; its trainer sets the limit and leaves it.
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended is None:
        yield
        return
    _work.begin(int(recommended), streams, model)
    try:
        yield
    finally:
        _work.end()


class _Work:
    """The pieces of work that are going on, in any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a generator that was dropped ends whenever memory is collected
        self.pieces, self.before, self.warned = 0, 0, False
        self.streams: list[Stream] = []

    def begin(self, limit: int, streams: tuple[Stream, ...], model: nn.Module | None) -> None:
        with self.lock:
            if not self.pieces:
                self.before, self.warned = mx.set_wired_limit(limit), False
            self.pieces += 1
            self.streams += [stream for stream in streams if stream not in self.streams]
            if model is not None and not self.warned:
                self.warned = _warn(model, limit)

    def end(self) -> None:
        with self.lock:
            self.pieces -= 1
            if self.pieces:
                return
            streams, self.streams = self.streams, []
            try:  # the limit must not change while MLX evaluates
                mx.synchronize()
                for stream in streams:
                    mx.synchronize(stream)
            finally:
                mx.set_wired_limit(self.before)


def _warn(model: nn.Module, limit: int) -> bool:
    """Log a warning if the weights are too large to leave room for anything else. Returns whether they are."""
    weights = sum(value.nbytes for value in dict(tree_flatten(model.parameters())).values())
    if weights <= LARGE * limit:
        return False
    logger.warning(
        f"the weights take {format_size(weights)} of the {format_size(limit)} that macOS keeps in memory for the GPU: "
        "this may be slow (`sudo sysctl iogpu.wired_limit_mb=…` raises the limit)"
    )
    return True


_work = _Work()
