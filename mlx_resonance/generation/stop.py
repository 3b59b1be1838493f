"""Stop strings: a text ends before the one that is complete first, however it is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError, check_option

MOST = 64  # stop strings


class StopStrings:
    """Passes on the pieces of a text up to the first stop string, and holds back what may be the beginning of one.

    The first is the one that ends first, so that nothing has to be read past it; of two that end together, the longer.

    Args:
        stop: the strings; none of them may be empty.

    Raises:
        UsageError: one is empty or no string, or there are too many.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        check_option("stop", not isinstance(stop, str), "a list of strings", stop)
        check_option("stop", len(stop) <= MOST, f"at most {MOST} strings", len(stop))
        if not all(isinstance(word, str) and word for word in stop):
            raise UsageError("a stop string is empty or not a string", option="stop")
        self.stop, self.found = tuple(stop), False
        self._held = ""

    def add(self, piece: str) -> str:
        """Take the next piece. Returns the text that is certain to come before any stop string."""
        if not self.stop:
            return piece
        text, self._held = self._held + piece, ""
        spans = [(place + len(word), place) for word in self.stop if (place := text.find(word)) >= 0]
        if spans:
            self.found = True
            return text[: min(spans)[1]]
        kept = max((_beginning(text, word) for word in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """The text held back, once no more pieces come."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, word: str) -> int:
    """How many characters at the end of a text are the beginning of a word."""
    longest = min(len(text), len(word) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(word[:length])), 0)
