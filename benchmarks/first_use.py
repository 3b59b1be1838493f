"""How long does the first rotation of a process take? It tries the kernel, and on a Mac compiles it.

    python benchmarks/first_use.py

Rotates queries and keys of one token twice: 32 and 8 heads × 128, float16. A kernel that passed is remembered in the
user's cache folder: the first start and the next ones differ. Last line: one JSON object.
"""

from __future__ import annotations

import json
import logging
import time

from mlx_resonance import ResonanceRoPE, yarn_frequencies
from mlx_resonance.kernels.trial import current_backend

import mlx.core as mx


class Messages(logging.Handler):
    """Collects what the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.texts.append(record.getMessage())


def main() -> None:
    messages = Messages()
    logging.getLogger("mlx_resonance").addHandler(messages)
    rope = ResonanceRoPE(yarn_frequencies(128, 10000.0, 8, 4096).resonate())
    q, k = (mx.random.normal((1, heads, 1, 128)).astype(mx.float16) for heads in (32, 8))
    mx.eval(q, k)  # the device is set up
    seconds = []
    for offset in (100_000, 100_001):
        start = time.perf_counter()
        mx.eval(rope.rotate(q, k, offset))
        seconds.append(round(time.perf_counter() - start, 5))
    report = {"device": str(mx.default_device()), "first_seconds": seconds[0], "second_seconds": seconds[1]}
    print(json.dumps(report | {"kernel": current_backend(), "messages": messages.texts}))


if __name__ == "__main__":
    main()
