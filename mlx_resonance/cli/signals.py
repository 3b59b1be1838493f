"""Signals that end a command: whatever is open is closed first."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_by(*signals: signal.Signals) -> Iterator[None]:
    """Make these signals an exit with the code that a shell reports for them; those that are ignored stay ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.getsignal(one) for one in signals if signal.getsignal(one) != signal.SIG_IGN}
    try:
        for one in before:
            signal.signal(one, _leave)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)
