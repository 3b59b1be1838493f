"""The passkey test: a number hidden in filler, at every length and depth of a grid, to be said at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from ..generation import generate
from ..records import Record, append_records, open_records
from .texts import check_results

KIND = "passkey"
FIELDS = {"length": int, "depth": int, "repetition": int, "found": bool}
ANSWER_TOKENS = 12  # five digits one by one, a space, and some more
# Landmark Attention's prompt (arXiv 2305.16300), as eval/passkey.py of the YaRN code has it.
INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STATEMENT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Grid:
    """What is tried: every length at every depth, several times.

    Args:
        lengths: tokens of prompt and answer together.
        depths: where the key is, in % of the filler, each in [0, 100].
        repetitions: keys tried at each.
        seed: of the keys, which depend on it, the length, the depth and the repetition alone.

    Raises:
        ValueError: an argument is out of range.
    """

    lengths: Sequence[int]
    depths: Sequence[int]
    repetitions: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"[passkey] lengths must be positive numbers of tokens, got {list(self.lengths)}")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"[passkey] depths must lie in [0, 100], got {list(self.depths)}")
        if self.repetitions < 1:
            raise ValueError(f"[passkey] repetitions must be at least 1, got {self.repetitions}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"[passkey] seed must lie in [0, 2**32), got {self.seed}")

    def cells(self) -> list[tuple[int, int, int]]:
        """Length, depth and repetition of every trial, the shortest first."""
        counts = range(self.repetitions)
        return [(length, depth, i) for length in sorted(self.lengths) for depth in self.depths for i in counts]

    def key(self, length: int, depth: int, repetition: int) -> int:
        """The number to find, 1 to 50 000 as in the YaRN code."""
        return int(np.random.default_rng([self.seed, length, depth, repetition]).integers(1, 50001))


def passkey_prompt(tokenizer: TokenizerWrapper, length: int, depth: int, key: int) -> list[int]:
    """A prompt that with its answer takes exactly `length` tokens.

    Args:
        tokenizer: from `load`.
        length: tokens of the prompt and of `ANSWER_TOKENS` more.
        depth: where the key is, in % of the filler.
        key: the number.

    Returns:
        Token ids, BOS in front where the tokenizer puts it there.

    Raises:
        ValueError: the length holds no filler.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    head = list(tokenizer.encode(INSTRUCTION + "\n"))
    statement = encode("\n" + STATEMENT.format(key=key) + "\n")
    question = encode("\n" + QUESTION)
    room = length - ANSWER_TOKENS - len(head) - len(statement) - len(question)
    if room < 1:
        raise ValueError(
            f"[passkey] a length of {length} tokens holds no filler: at least {length - room + 1} are needed"
        )
    unit = encode(FILLER + " ")
    filler = (unit * (room // len(unit) + 1))[:room]
    before = round(room * depth / 100)
    return head + filler[:before] + statement + filler[before:] + question


def first_integer(text: str) -> int | None:
    """The first whole number of an answer, which is what counts."""
    found = re.search(r"\d+", text)
    return None if found is None else int(found[0])


def run_passkey(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    grid: Grid,
    output: Path,
    header: Record,
    on_trial: Callable[[int, int, Record], None] | None = None,
    **options: Any,
) -> list[Record]:
    """Try every cell of the grid that the file has no result of.

    Args:
        model, tokenizer: from `load`.
        grid: what to try.
        output: JSON lines, one per trial; a killed run goes on with them, a larger grid adds to them.
        header: what they have in common; the seed is added.
        on_trial: called with the number of trials done, their total, and the last one.
        options: of `stream_generate`, such as kv_bits.

    Returns:
        The grid's results, in its order: `length`, `depth`, `repetition`, `key`, `answer`, `found`.

    Raises:
        ValueError: a length is too short or beyond the checkpoint's context, or the file is of other settings, or a
            line of it is no result.
    """
    for length in grid.lengths:  # before the file is made
        passkey_prompt(tokenizer, length, 0, 50000)
    cells = grid.cells()
    lines = open_records(output, KIND, header | {"seed": grid.seed})
    check_results(KIND, output, lines, FIELDS)
    done = {(line["length"], line["depth"], line["repetition"]): line for line in lines}
    for number, cell in enumerate(cells, 1):
        if cell not in done:
            key = grid.key(*cell)
            prompt = passkey_prompt(tokenizer, cell[0], cell[1], key)
            answer = generate(model, tokenizer, prompt, max_tokens=ANSWER_TOKENS, **options)
            trial = dict(zip(("length", "depth", "repetition"), cell, strict=True))
            done[cell] = trial | {"key": key, "answer": answer, "found": first_integer(answer) == key}
            append_records(output, [done[cell]])
        if on_trial is not None:
            on_trial(number, len(cells), done[cell])
    return [done[cell] for cell in cells]


def accuracy(grid: Grid, trials: Sequence[Record]) -> NDArray[np.float64]:
    """The part of keys that were found, shape (depths, lengths), lengths in rising order."""
    lengths = sorted(grid.lengths)
    found = np.zeros((len(grid.depths), len(lengths)))
    for trial in trials:
        found[list(grid.depths).index(trial["depth"]), lengths.index(trial["length"])] += trial["found"]
    return found / grid.repetitions
