"""Reading a prompt in chunks: of fixed size on a CPU, sized by time on a GPU, where no launch may take too long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attention import Inference
from ..errors import DeviceError

STEP = 2048  # tokens
PREFILL_BATCH = 8  # prompts of a batch read at once
# macOS kills what keeps a GPU from drawing the screen. Launches are of one layer at most; its share of a chunk's time
# is an upper bound of its attention's.
LAYER_SECONDS = 0.3
FIRST, LEAST = 256, 32  # tokens of the first chunk on a GPU, and of the smallest one
KILLED = ("Impacting Interactivity", "Timeout", "maximum allowed buffer size")  # in Metal's words

Progress = Callable[[int, int], None]


class Pace:
    """How many tokens of a prompt to read next: fixed chunks on a CPU, chunks by time on a GPU.

    On a GPU the first chunk is small. Each later one is at most twice as long as the one before, and so long that a
    layer would take `LAYER_SECONDS` if all its time grew with the products of queries and keys.

    Args:
        layers: of the model.
        step: maximum number of tokens in a chunk.
        gpu: whether to go by time; None for MLX's default device.
        clock: seconds, like `time.perf_counter`.
        agree: makes the smallest of their numbers out of those of several processes, which read the same chunks.
    """

    def __init__(
        self,
        layers: int,
        step: int = STEP,
        *,
        gpu: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self.layers, self.step, self.clock, self.agree = layers, step, clock, agree
        self.by_time = mx.default_device() != mx.cpu if gpu is None else gpu
        self._longest = min(step, FIRST) if self.by_time else step
        self._products = math.inf  # queries × keys that fit into the time

    def size(self, done: int) -> int:
        """Tokens of the next chunk, after `done`: at most `step`."""
        size = self._longest
        if not math.isinf(self._products):
            fitting = int((math.sqrt(done * done + 4 * self._products) - done) / 2)  # n (done + n) = products
            size = min(size, max(min(LEAST, self.step), fitting))
        return self.agree(size) if self.by_time and self.agree else size

    @contextmanager
    def reading(self, tokens: int, done: int) -> Iterator[None]:
        """Around reading a chunk of `tokens` after `done`, evaluation included: measures it.

        Raises:
            DeviceError: the GPU was kept too long, or a buffer is too large for it; a remedy is a smaller step.
        """
        start = self.clock()
        with device_errors(tokens):
            yield
        if self.by_time:
            seconds = max((self.clock() - start) / self.layers, 1e-9)
            self._products = LAYER_SECONDS / seconds * tokens * (done + tokens)
            self._longest = min(self.step, 2 * max(tokens, min(FIRST, self.step)))


@contextmanager
def device_errors(tokens: int = 1) -> Iterator[None]:
    """Around work on `tokens` tokens at once: what Metal says if it does not carry it out becomes a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not any(words in said for words in KILLED):
            raise
        smaller = [{"prefill_step_size": max(1, tokens // 2)}] if tokens > 1 else []
        what = f"read {tokens:,} tokens in one pass" if smaller else "write a token"
        raise DeviceError(f"the GPU did not {what}: {said}", remedies=[*smaller, {"kv_bits": 8}]) from None


def prefill(
    model: nn.Module,
    tokens: Sequence[int],
    cache: list[Any],
    *,
    step: int = STEP,
    pace: Pace | None = None,
    before: int = 0,
    prompt_progress_callback: Progress | None = None,
) -> None:
    """Append the keys and values of all tokens but the last to the caches.

    An interrupt takes effect after the chunk that is being read. After it, as after an error, the caches hold whole
    chunks.

    Args:
        model: from `load`.
        tokens: the whole prompt.
        cache: one per layer; it may hold the tokens of an earlier text, then the first tokens of the prompt.
        step: maximum number of tokens in a chunk.
        pace: decides how many tokens a chunk has; None for a new one with this step.
        before: number of tokens of an earlier text in the cache.
        prompt_progress_callback: called with the number of prompt tokens done and their total.

    Raises:
        DeviceError: the GPU did not carry out a chunk.
    """
    pace, read = pace or Pace(len(model.layers), step), Inference(model)
    done, total = cache[0].offset - before, len(tokens)
    if prompt_progress_callback is not None:
        prompt_progress_callback(done, total)
    try:
        while done < total - 1:
            size = min(pace.size(before + done), total - 1 - done)
            with pace.reading(size, before + done):
                read(mx.array(list(tokens[done : done + size]))[None], cache=cache)
                done += size  # before eval: an interrupt is raised only after eval has returned
                try:
                    mx.eval([layer.state for layer in cache])  # not the logits: this skips the head
                except Exception:
                    done -= size  # the GPU failed: there is no telling what the new keys are
                    raise
            mx.clear_cache()
            if prompt_progress_callback is not None:
                prompt_progress_callback(done, total)
    except BaseException:
        for layer in cache:  # some may have counted a chunk that the others have not seen
            layer.trim(layer.offset - before - done)
        raise
