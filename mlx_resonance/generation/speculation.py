"""How many tokens to propose for one pass of the model: what a proposal gains is weighed by the times of passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import Protocol

FIRST, MOST = 4, 32  # tokens of the first proposal, and of the longest
WINDOW = 64  # tokens: proposals pause when the last ones gained less than they cost,
LOSS = 1.0  # or, before, when they have lost more than this many passes of one token since they did best
PAUSE, LONGEST_PAUSE = 64, 1024  # tokens of the first pause and of the longest; each is twice the one before
RUN = 2  # tokens in a row that would have been proposed rightly end the first pause; one more for each one after it
TIMES = 9  # passes of a length whose median time counts
RISK = 4.0  # passes of one token that a proposal may cost if nothing of it is right


class Proposer(Protocol):
    """Guesses how a text continues.

    Attributes:
        free: a guess costs next to nothing, so that a pause watches whether guesses would be right.
    """

    free: bool

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none if it has no guess."""

    def accepted(self, tokens: Sequence[int]) -> None:
        """The text has grown by these tokens, whether or not they were proposed."""


class Times:
    """Median times of the latest passes, by the number of tokens that were proposed."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._seconds: dict[int, deque[float]] = {}

    def add(self, proposed: int, seconds: float) -> None:
        """Count a pass. The first one of a length counts until there is a second: a GPU compiles kernels for it."""
        bucket = proposed.bit_length()
        if bucket not in self._first:
            self._first[bucket] = seconds
        else:
            self._seconds.setdefault(bucket, deque(maxlen=TIMES)).append(seconds)

    def of(self, proposed: int) -> float | None:
        """Seconds of such a pass; None if it is not known yet. A first one costs no more than its tokens one by one."""
        bucket = proposed.bit_length()
        if known := self._seconds.get(bucket):
            return median_low(known)
        first, plain = self._first.get(bucket), self.of(0) if proposed else None
        return first if first is None or plain is None else min(first, (proposed + 1) * plain)


class Proposals:
    """Decides how many tokens to propose, from how many were accepted and what passes of the model took.

    The length doubles after a proposal of that length was accepted whole, and halves after one of which nothing was. It
    is at most such that a proposal of which nothing is right would cost about 4 passes of one token.
    A pass that emits n tokens gains n times the time of a pass of one token, less its own. Proposals pause where the
    last 64 tokens lost time, or where more than a pass was lost since the gains were highest: for 64 tokens, then 128,
    up to 1024, and for 64 again after a gain of more than a pass. A pause ends early where a free proposer would have
    been right a few times in a row.

    Args:
        proposer: makes the proposals.
        length: always propose as many tokens, whatever they gain; None to adapt.
    """

    def __init__(self, proposer: Proposer, length: int | None = None) -> None:
        self.proposer, self.fixed = proposer, length
        self.length = FIRST if length is None else length
        self.times = Times()
        self.paused = 0  # tokens for which nothing more is proposed
        self._pauses = 0  # in a row, without a gain
        self._read = proposer.free  # another reads the prompt first, which says nothing about later passes
        self._right, self._guess = 0, [-1]  # while paused: guesses in a row that were right, and the next one
        self._forget()

    def _forget(self) -> None:
        self._window: deque[tuple[int, float]] = deque()  # passes: tokens emitted, seconds gained
        self._tokens, self._best, self._sum = 0, 0.0, 0.0  # tokens in the window; seconds gained since the last pause

    def awaits(self) -> bool:
        """Whether the next pass may get a proposal, so that its first token must be known before it starts."""
        return not self.paused and (not self.proposer.free or bool(self.proposer.propose(1)))

    def propose(self, most: int) -> list[int]:
        """The tokens to check in the next pass, at most `most`; none if it shall be a plain one."""
        count = 0 if self.paused else min(self.length, most)
        return self.proposer.propose(count) if count > 0 else []

    def passed(self, proposed: int, tokens: Sequence[int], seconds: float) -> None:
        """Learn from a pass.

        Args:
            proposed: number of tokens that it checked.
            tokens: those it emitted: the accepted ones, and one more.
            seconds: that it took.
        """
        if self._read or not proposed:
            self.times.add(proposed, seconds)
        self._read = self._read or proposed > 0
        self.proposer.accepted(tokens)
        if self.fixed is not None:
            return
        if self.paused:
            self._watch(tokens)
            return
        if proposed:
            self._adapt(proposed, len(tokens) - 1)
        self._weigh(proposed, len(tokens))

    def _adapt(self, proposed: int, accepted: int) -> None:
        if accepted == proposed >= self.length:
            self.length = min(MOST, 2 * self.length)
        elif not accepted:
            self.length = max(1, self.length // 2)
        plain, whole = self.times.of(0), self.times.of(proposed)
        if plain is not None and whole is not None and whole > plain:
            self.length = max(1, min(self.length, int(RISK * plain * proposed / (whole - plain))))

    def _weigh(self, proposed: int, emitted: int) -> None:
        """Pause if the latest proposals did not pay."""
        plain, whole = self.times.of(0), self.times.of(proposed)
        gain = emitted * plain - whole if proposed and plain is not None and whole is not None else 0.0
        self._window.append((emitted, gain))
        self._tokens += emitted
        while self._tokens - self._window[0][0] >= WINDOW:
            self._tokens -= self._window.popleft()[0]
        self._sum += gain
        self._best = max(self._best, self._sum)
        if plain is None or not proposed:
            return
        enough = LOSS * plain
        if self._sum > enough:
            self._pauses = 0
        lately = sum(seconds for _, seconds in self._window)
        if self._best - self._sum > enough or (self._tokens >= WINDOW and lately < 0):
            self.paused = min(LONGEST_PAUSE, PAUSE << self._pauses)
            self._pauses += 1
            self._right, self._guess = 0, self._ask()

    def _watch(self, tokens: Sequence[int]) -> None:
        """Count down a pause."""
        self.paused = max(0, self.paused - len(tokens))
        self._right = self._right + 1 if list(tokens) == self._guess else 0
        self._guess = self._ask()
        if self._right >= RUN + self._pauses - 1:
            self.paused = 0
        if not self.paused:
            self.length = FIRST
            self._forget()

    def _ask(self) -> list[int]:
        return self.proposer.propose(1) if self.proposer.free else [-1]
