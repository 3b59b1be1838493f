"""Work that needs exact float32 products: in a process without TF32, where MLX may use that in this one.

TF32 rounds the factors to mantissas of 10 bits. MLX multiplies float32 matrices in it on NVIDIA GPUs and, from macOS
26.2 on, on those of the M5, unless MLX_ENABLE_TF32=0 was set before the first product: it reads the variable only once.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

SWITCH = "MLX_ENABLE_TF32"
T = TypeVar("T")


def may_use_tf32() -> bool:
    """Whether MLX may multiply float32 matrices in TF32 here: on any GPU, since which ones do is for MLX to decide."""
    return mx.default_device() == mx.gpu and os.environ.get(SWITCH) != "0"


def in_float32(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function such that float32 products are exact: here, or in a process of its own.

    What it returns, raises, logs and prints to stderr is the same in both; what it prints to stdout goes to stderr. The
    process ends with this one, and on an interrupt.

    Args:
        work: a function of a module, by whose name the process finds it.
        arguments: what pickle can pass on.

    Raises:
        ChildProcessError: the process was killed.
    """
    if not may_use_tf32():
        return work(*arguments)
    path = [entry for entry in sys.path if isinstance(entry, str)]  # nothing in the current folder comes first
    code = f"import sys; sys.path[:] = {path!r}; from {__name__} import answer; answer()"
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {SWITCH: "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        try:
            answered = _ask(child, pickle.dumps((work, arguments)))
            exit_code = child.wait()
        finally:
            child.kill()
            child.wait()
        said.seek(0)
        sys.stderr.write(said.read().decode(errors="replace"))
    if exit_code or not answered:
        raise ChildProcessError(f"the process that computes in float32 has ended with exit code {exit_code}")
    result: T
    result, error, trace, records = pickle.loads(answered)
    for record in records:
        logging.getLogger(record.name).handle(record)
    if error is not None:
        raise error from RuntimeError(trace)
    return result


def _ask(child: subprocess.Popen[bytes], question: bytes) -> bytes:
    """What the process answers; nothing if it dies. Its stdin stays open meanwhile: it ends when that is closed."""
    assert child.stdin is not None and child.stdout is not None
    try:
        with child.stdin, child.stdout:
            child.stdin.write(question)
            child.stdin.flush()
            return child.stdout.read()
    except BrokenPipeError:
        return b""


class _Kept(logging.Handler):
    """Keeps records for the other process."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


def answer() -> None:
    """The process: what `in_float32` starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has asked decides what an interrupt means
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    kept, logger = _Kept(), logging.getLogger("mlx_resonance")
    logger.addHandler(kept)
    logger.propagate = False
    work, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    result = error = None
    trace = ""
    try:
        result = work(*arguments)
    except Exception as raised:
        error, trace = _picklable(raised), traceback.format_exc()
    sys.stderr.flush()
    answers.write(pickle.dumps((result, error, trace, kept.records)))
    answers.close()
    os._exit(0)  # the answer counts, not what libraries do when an interpreter ends


def _end_with_stdin() -> None:
    os.read(0, 1)  # returns when stdin is closed: the other process has the answer, or has ended
    os._exit(0)


def _picklable(error: Exception) -> Exception:
    """The exception, or one that says the same and can be passed on."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
