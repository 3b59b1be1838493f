"""Position maps: which positions a query and a key count as, so that a text past the window shows none that is new.

Queries see near keys at their own distance, and keys further away at positions that are grouped or counted anew, which
stay within the length that the model was trained on. Nothing is trained, and no wavelength changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError, check_option
from .rope_types import LONGEST

Method = Literal["self-extend", "dca", "dynamic"]
METHODS: tuple[Method, ...] = get_args(Method)
EXAMPLE = "self-extend:1024:12"
Positions = NDArray[np.int64]


class Piece(NamedTuple):
    """Keys that some queries see by one rule.

    Attributes:
        queries: position of each query, shape (L,); None for its own.
        first, end: range of the keys that each query sees, shape (L,) each; their positions are their own if `queries`
            is None, else those of `PositionMap.of_keys`.
    """

    queries: Positions | None
    first: Positions
    end: Positions


class Run(NamedTuple):
    """Queries in a row for which a key that is far away has the same position.

    Attributes:
        start, end: range of the queries in the text.
        form: what `PositionMap.of_keys` takes for their far keys; 0 if they see every key at its own position.
        pieces: of the keys; each query sees every key up to its own in exactly one of them.
    """

    start: int
    end: int
    form: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PositionMap:
    """Where a query and a key count as being. It depends on the two alone, never on how a text is cut into chunks.

    - `self-extend` (Jin et al. 2024, arXiv 2401.01325, section 3.2): keys fewer than `window` tokens back keep their
      distance; a key j further away is at j // group, for a query at i // group + window - window // group.
    - `dca` (An et al. 2024, arXiv 2402.17463, section 3): the text has chunks of `window` tokens, s, and a key j is at
      j % s. A query i is at i % s for its own chunk, at min(i % s + s, trained - 1) for the one before, and at
      trained - 1 for those further back: the paper's formulas. Its authors' code has other defaults.
    - `dynamic`: below `trained`, nothing changes. Past it, `self-extend` with the smallest group for which a query i is
      below `kept`. It depends on i, not on the length of the text so far: a chunk's size does not change the text.
      After Jet-Long (arXiv 2607.07740), whose group grows with the text.

    Args:
        method: one of `METHODS`.
        trained: tokens of context that the model was trained for.
        window: tokens, below `trained`.
        group: tokens that share a position; for `self-extend` only.

    Raises:
        UsageError: a value is out of range.
    """

    method: Method
    trained: int
    window: int
    group: int | None = None

    def __post_init__(self) -> None:
        check_option("extend", self.method in METHODS, f"one of {', '.join(METHODS)}", self.method)
        what, most = f"the window of {self.method}", self.trained - 1
        if not 1 <= self.window <= most:
            raise UsageError(f"{what} must be in [1, {most:,}] tokens, got {self.window:,}", option="extend")
        if (self.group is None) == (self.method == "self-extend"):
            takes = "needs a group" if self.group is None else "takes no group"
            raise UsageError(f"{self.method} {takes}, the number of tokens that share a position", option="extend")
        if self.group is not None and not 1 <= self.group <= LONGEST:
            raise UsageError(f"a group must have 1 to 2**31 tokens, got {self.group}", option="extend")

    @property
    def unchanged(self) -> int:
        """Number of first tokens that see every key at its own position."""
        return self.trained if self.method == "dynamic" or self.group == 1 else self.window

    @property
    def longest(self) -> int:
        """Maximum number of tokens whose positions stay below `trained`."""
        return min(LONGEST, self._reach(self.group)) if self.group is not None else LONGEST

    @property
    def kept(self) -> int:
        """Number of positions in use where the group is not given: the window, and two thirds of the others.

        A model has seen the largest distances least: with all positions in use, stdlib-llama finds 11 of 15 keys in
        2048 tokens, with these 15.
        """
        return self.window - 2 * (self.window - self.trained) // 3

    def _reach(self, group: int) -> int:
        """Number of first tokens i that a group serves: i // group + window - window // group is below the limit."""
        limit = self.trained if group == 1 or self.group is not None else self.kept
        return (limit - self.window + self.window // group) * group

    @property
    def extend(self) -> str:
        """What `position_map` makes it of."""
        return ":".join(str(part) for part in (self.method, self.window, self.group) if part is not None)

    def group_of(self, query: int) -> int:
        """The group of a query: the given one, or the smallest that serves it."""
        if self.group is not None:
            return self.group
        if query < self.trained:
            return 1
        # No smaller one reaches it: window // group * group is at most window.
        group = max(2, -(-(query + 1 - self.window) // (self.kept - self.window)))
        while self._reach(group) <= query:
            group += 1
        return group

    def of_keys(self, form: int, keys: Positions) -> Positions:
        """Positions of keys that are far away, from their own.

        Args:
            form: of the run.
            keys: their own positions.
        """
        return keys % form if self.method == "dca" else keys // form

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """The runs of the queries from `start` up to `end`."""
        while start < end:
            if self.method == "dca":
                chunk = start // self.window
                stop = min(end, (chunk + 1) * self.window)
                yield self._chunk(start, stop, chunk * self.window)
            else:
                group = self.group_of(start)
                stop = end if self.group is not None else min(end, self._reach(group))
                yield self._grouped(start, stop, group)
            start = stop

    def _grouped(self, start: int, end: int, group: int) -> Run:
        queries = np.arange(start, end)
        window, none = self.window, np.zeros_like(queries)
        if group == 1 or end <= window:
            return Run(start, end, 0, (Piece(None, none, queries + 1),))
        near = np.maximum(queries + 1 - window, 0)
        far = Piece(queries // group + window - window // group, none, near)
        return Run(start, end, group, (far, Piece(None, near, queries + 1)))

    def _chunk(self, start: int, end: int, first: int) -> Run:
        queries, size, last = np.arange(start, end), self.window, self.trained - 1

        def all_at(position: int) -> Positions:
            return np.full_like(queries, position)

        own = Piece(None, all_at(first), queries + 1)
        if not first:
            return Run(start, end, 0, (own,))
        before = Piece(np.minimum(queries % size + size, last), all_at(first - size), all_at(first))
        further = Piece(all_at(last), all_at(0), all_at(first - size))
        return Run(start, end, size, (further, before, own) if first > size else (before, own))


def position_map(extend: str, trained: int | None, length: int | None = None) -> PositionMap:
    """The position map that a user asks for, with what is not given chosen from the lengths.

    Args:
        extend: a method; after colons its window and its group may follow, as in `self-extend:1024:12`. The window is a
            quarter of `trained` by default, for `dca` three quarters, as in its paper. The group of `self-extend` is by
            default the smallest for the next power of two times `trained` that holds the text, so that a text which
            grows seldom changes it.
        trained: tokens of context that the model was trained for.
        length: tokens of the longest text; None for eight times `trained`.

    Raises:
        UsageError: it is not such a text, or as of `PositionMap`; or the trained context is not known or too short.
    """
    name, *numbers = extend.split(":")
    method = next((known for known in METHODS if known == name), None)
    right = method is not None and len(numbers) <= 2 and all(number.isdecimal() for number in numbers)
    check_option("extend", right, f"{', '.join(METHODS)}, or with window and group as in {EXAMPLE}", repr(extend))
    assert method is not None
    if trained is None or trained < 2:
        had = "which config.json does not state" if trained is None else f"and the checkpoint's is {trained}"
        raise UsageError(f"{method} needs the length that the model was trained for, {had}", option="extend")
    window, group = ([int(number) for number in numbers] + [None, None])[:2]
    if window is None:
        window = max(1, trained * 3 // 4 if method == "dca" else trained // 4)
    if method == "self-extend" and group is None:
        goal = 8 * trained if length is None else trained
        while goal < (length or 0):
            goal *= 2
        group = PositionMap("dynamic", trained, window).group_of(goal - 1)
    return PositionMap(method, trained, window, group)
