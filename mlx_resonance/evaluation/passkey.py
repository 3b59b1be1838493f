"""The passkey test: a number is hidden in filler, at every length and depth of a grid, and asked for at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import UsageError, check_option
from ..generation.kv_format import KVBits, KVFormat
from ..rope_types import LONGEST
from ..run_log import Record, RunLog
from ..scaling import check_context
from ..wired import wired
from .answers import greedy

KIND = "passkey"
KEY = ("length", "depth", "repetition")
FIELDS = dict.fromkeys((*KEY, "key"), int) | {"answer": str, "found": bool}
MOST = 10_000  # repetitions
ANSWER_TOKENS = 12  # five digits as single tokens, a space, and a few more
# Landmark Attention's prompt (arXiv 2305.16300), as eval/passkey.py of the YaRN code has it.
INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STATEMENT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class PasskeyGrid:
    """What to try: every length at every depth, several times.

    Args:
        lengths: tokens of prompt and answer together.
        depths: where the key is, in % of the filler, each in [0, 100].
        repetitions: number of keys at each length and depth, at most 10 000.
        seed: of the keys, which depend only on it, the length, the depth and the repetition.

    Raises:
        UsageError: an argument is out of range.
    """

    lengths: Sequence[int]
    depths: Sequence[int]
    repetitions: int
    seed: int = 0

    def __post_init__(self) -> None:
        right = bool(self.lengths) and all(1 <= length <= LONGEST for length in self.lengths)
        check_option("lengths", right, "in [1, 2**31] tokens", list(self.lengths))
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            check_option(name, len(set(values)) == len(values), "each given once", list(values))
        right = bool(self.depths) and all(0 <= depth <= 100 for depth in self.depths)
        check_option("depths", right, "in [0, 100]", list(self.depths))
        check_option("repetitions", 1 <= self.repetitions <= MOST, f"in [1, {MOST}]", self.repetitions)
        check_option("seed", 0 <= self.seed < 2**32, "in [0, 2**32)", self.seed)

    def cells(self) -> list[tuple[int, int, int]]:
        """Length, depth and repetition of every trial, the shortest first."""
        counts = range(self.repetitions)
        return [(length, depth, i) for length in sorted(self.lengths) for depth in self.depths for i in counts]

    def key(self, length: int, depth: int, repetition: int) -> int:
        """The number to find, 1 to 50 000 as in the YaRN code."""
        return int(np.random.default_rng([self.seed, length, depth, repetition]).integers(1, 50001))


def passkey_prompt(
    tokenizer: TokenizerWrapper, length: int, depth: int, key: int, filler: Sequence[int] | None = None
) -> list[int]:
    """A prompt, with BOS in front if the tokenizer puts it there, that takes `length` tokens together with its answer.

    Args:
        tokenizer: from `load`.
        length: tokens of the prompt, plus `ANSWER_TOKENS`.
        depth: where the key is, in % of the filler.
        key: the number.
        filler: token ids of the text that hides it, from their start; repeated if they are too few. None for the YaRN
            code's sentences.

    Raises:
        UsageError: the length has no room for filler.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    head = list(tokenizer.encode(INSTRUCTION + "\n"))
    statement = encode("\n" + STATEMENT.format(key=key) + "\n")
    question = encode("\n" + QUESTION)
    room = length - ANSWER_TOKENS - len(head) - len(statement) - len(question)
    if room < 1:
        needed = length - room + 1
        raise UsageError(f"{length} tokens have no room for filler: at least {needed} are needed", option="lengths")
    unit = encode(FILLER + " ") if filler is None else list(filler)
    text = (unit * (room // len(unit) + 1))[:room]
    before = round(room * depth / 100)
    return head + text[:before] + statement + text[before:] + question


def shuffled_filler(tokenizer: TokenizerWrapper, tokens: int, seed: int) -> list[int]:
    """Token ids of the filler's sentences in random order, at least `tokens` of them."""
    sentences = [sentence + "." for sentence in FILLER.rstrip(".").split(". ")]
    order = np.random.default_rng(seed).integers(len(sentences), size=tokens)  # a sentence has several tokens
    text = " ".join(sentences[i] for i in order) + " "
    return list(tokenizer.encode(text, add_special_tokens=False))


def first_integer(text: str) -> int | None:
    """The first integer of an answer, which is what counts."""
    found = re.search(r"\d+", text)
    return None if found is None else int(found[0])


@wired()
def run_passkey(
    checkpoint: Checkpoint,
    grid: PasskeyGrid,
    output: Path,
    *,
    kv_bits: KVBits = None,
    on_trial: Callable[[int, int, Record], None] | None = None,
) -> list[Record]:
    """Try every cell of the grid that the run log has no result of.

    Args:
        checkpoint: its weights are read if a result is missing.
        grid: what to try.
        output: the file of the run log, one line per trial; a larger grid adds to it.
        kv_bits: as in `stream_generate`.
        on_trial: called with the number of trials done, their total, and the last one.

    Returns:
        The grid's results, in its order: `length`, `depth`, `repetition`, `key`, `answer`, `found`.

    Raises:
        UsageError: a length is too short or exceeds the checkpoint's context, or the file is of other settings, or a
            line of it is not a result.
    """
    tokenizer, cells, model = checkpoint.tokenizer, grid.cells(), None
    passkey_prompt(tokenizer, min(grid.lengths), 0, 50000)  # before the file is made
    check_context(checkpoint.rope, max(grid.lengths))
    settings = checkpoint.settings(KVFormat.of(kv_bits).value) | {"seed": grid.seed}
    log = RunLog(output, KIND, settings, about={"model": checkpoint.name}, key=KEY, fields=FIELDS)
    trials = []
    for number, cell in enumerate(cells, 1):
        key = grid.key(*cell)
        trial = log.find(*cell, key=key)
        if trial is None:
            model = model or checkpoint.load()
            prompt = passkey_prompt(tokenizer, cell[0], cell[1], key)
            answer, *_ = greedy(model, tokenizer, prompt, ANSWER_TOKENS, kv_bits=kv_bits)
            found = first_integer(answer) == key
            trial = dict(zip(KEY, cell, strict=True)) | {"key": key, "answer": answer, "found": found}
            log.append(trial)
        trials.append(trial)
        if on_trial is not None:
            on_trial(number, len(cells), trial)
    return trials


def accuracy(grid: PasskeyGrid, trials: Sequence[Record]) -> NDArray[np.float64]:
    """The share of keys that were found, shape (depths, lengths), with the lengths in rising order."""
    lengths = sorted(grid.lengths)
    found = np.zeros((len(grid.depths), len(lengths)))
    for trial in trials:
        found[list(grid.depths).index(trial["depth"]), lengths.index(trial["length"])] += trial["found"]
    return found / grid.repetitions
