"""PosGen's tasks: sequences in which every token follows from a fixed number of earlier ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, check_option

Int32Array = NDArray[np.int32]

SUBTASKS = ("recursive", "cot", "semi-recursive")
ARITHMETICS = ("mod_addition", "pow_sin", "pow_sin_2pi")
KINDS = ("first", "near", "far")
LARGEST_SUM = 2**20  # of near and far tokens: each sum has an entry in a table


@dataclass(frozen=True)
class Task:
    """A rule that makes the next token from the last `near` tokens and `far` tokens further back.

    The far tokens of a `recursive` sequence are those just before the near ones; those of a `cot` (chain of thought)
    sequence are its first ones; those of a `semi-recursive` sequence are a window that moves by one token after every
    two.

    Args:
        subtask: one of `SUBTASKS`.
        arithmetic: one of `ARITHMETICS`, applied to the sum of the near and far tokens.
        modulus: number of digits, at least 2; modulus · (near + far) is at most 2²⁰.
        near: number of near tokens (k in the paper), at least 1.
        far: number of far tokens (j in the paper), at least 0.

    Raises:
        UsageError: an argument is none of these.

    Source: arXiv 2403.00071, section 5; sheryc/resonance_rope `src/data/components/`.
    """

    subtask: str
    arithmetic: str = "mod_addition"
    modulus: int = 17
    near: int = 3
    far: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("subtask", self.subtask, SUBTASKS),
            ("arithmetic", self.arithmetic, ARITHMETICS),
        ):
            check_option(name, value in known, f"one of {', '.join(known)}", repr(value))
        for name, number, least in (("modulus", self.modulus, 2), ("near", self.near, 1), ("far", self.far, 0)):
            check_option(name, number >= least, f"at least {least}", number)
        if self.modulus * self.seed_length > LARGEST_SUM:
            raise UsageError(
                f"modulus times near + far must be at most 2**20, got {self.modulus} times {self.seed_length}",
                option="modulus",
            )

    @property
    def seed_length(self) -> int:
        """Number of tokens that a sequence starts from: near + far."""
        return self.near + self.far

    def window(self, position: int) -> int:
        """The position of the first of the far tokens that decide a token."""
        start = self.seed_length
        return {"recursive": position - start, "cot": 0, "semi-recursive": (position - start) // 2}[self.subtask]

    def kinds(self, length: int) -> NDArray[np.str_]:
        """What each predicted token can follow from, shape (length - near - far,).

        `first`: nothing but the sum itself. `near`: the last near + far tokens, without a look at the far window,
        either because they contain it (recursive) or because the window has not moved since the token before, which
        tells its sum (the shortcut). `far`: the sum itself, with the tokens of a window that has moved.
        """
        positions = range(self.seed_length, length)
        near = [
            self.window(position) in (self.window(position - 1), position - self.seed_length) or not self.far
            for position in positions
        ]
        return np.array(["first", *np.where(near[1:], "near", "far")])

    def results(self) -> Int32Array:
        """The next token for every sum of near and far tokens, shape ((near + far)·modulus + 1,), read-only."""
        return _results(self.arithmetic, self.modulus, self.seed_length * self.modulus)

    def answers(self, rows: Int32Array) -> Int32Array:
        """What the rule says comes next in rows of any digits.

        Args:
            rows: shape (N, L), L at least near + far.

        Returns:
            int32, shape (N, L - near - far): for each position after the seed, the answer to the digits before it.
        """
        positions = range(self.seed_length, rows.shape[1])
        windows = np.array([self.window(position) for position in positions], dtype=np.int64)
        sums: NDArray[np.int64] = np.cumsum(np.pad(rows, ((0, 0), (1, 0))), axis=1, dtype=np.int64)
        near = sums[:, self.seed_length : -1] - sums[:, self.far : -1 - self.near]
        return self.results()[near + sums[:, windows + self.far] - sums[:, windows]]

    def extend(self, seeds: Int32Array, length: int) -> Int32Array:
        """Extend seeds to sequences.

        Args:
            seeds: shape (N, near + far), tokens in [0, modulus).
            length: tokens of a sequence, at least near + far.

        Returns:
            int32, shape (N, length).

        Raises:
            UsageError: the length is shorter than the seed.
        """
        start, near, far = self.seed_length, self.near, self.far
        check_option("length", length >= start, f"at least near + far = {start} tokens", length)
        results = self.results()
        # Positions first: a step reads and writes whole rows of memory.
        tokens = np.empty((length, len(seeds)), dtype=np.int32)
        tokens[:start] = seeds.T
        near_sum = tokens[far:start].sum(axis=0)
        for position in range(start, length):
            first = self.window(position)
            total = near_sum + tokens[first] if far == 1 else near_sum + tokens[first : first + far].sum(axis=0)
            np.take(results, total, out=tokens[position])
            near_sum += tokens[position] - tokens[position - near]
        return np.ascontiguousarray(tokens.T)


@lru_cache(maxsize=8)
def _results(arithmetic: str, modulus: int, largest: int) -> Int32Array:
    functions = {
        "mod_addition": lambda s: s % modulus,
        "pow_sin": lambda s: math.floor(math.pow(math.sin(s), 2) * modulus),
        "pow_sin_2pi": lambda s: math.floor(abs(math.sin(2 * math.pi * (s % modulus) / modulus)) * modulus),
    }
    # pow_sin_2pi of a quarter turn is the modulus itself: not a digit but [UNK], as in the official tables.
    found = np.array([functions[arithmetic](s) for s in range(largest + 1)], dtype=np.int32)
    found.setflags(write=False)
    return found
