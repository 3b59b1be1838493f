"""RULER (Hsieh et al. 2024, arXiv 2404.06654): its synthetic tasks, and how their examples are made.

Sources: NVIDIA/RULER at c3f5e3b, scripts/synthetic.yaml (tasks), scripts/data/synthetic (prompts, which are the
benchmark's own words, budgets and how texts are made), scripts/eval/synthetic/constants.py (scores). What differs here:

- An example depends only on the seed, its task, its length and its number: more samples or tasks do not change it. Its
  words come from `word_lists`; RULER uses the package wonderwords.
- The essay is the user's text, or sentences made of these words; RULER uses Paul Graham's essays. Needles lie at one of
  40 depths in every haystack, not only in essays.
- The solved example of variable tracking has 15 lines of noise, or one line for every 128 tokens of the length if that
  is fewer; RULER's has 500 tokens.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import NamedTuple

from ..errors import UsageError
from .word_lists import ADJECTIVES, NOUNS, VERBS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {values} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # where needles may lie in an essay, in %
HOPS = 4  # of variable tracking
COMMON = 10  # words to find among others
SHORT = 4096  # tokens; below, the lists repeat their words less often
ESSAY = 10000  # sentences of the made-up essay, which repeats after them


class Example(NamedTuple):
    """A prompt, the beginning of its answer, and what the answer must contain."""

    text: str
    start: str
    references: list[str]


# Takes random numbers, a length in tokens, a size, and the sentences of an essay.
Maker = Callable[[random.Random, int, int, Sequence[str]], Example]


@cache
def made_essay() -> tuple[str, ...]:
    """Sentences without numbers and with little meaning, the same in every run."""
    rng = random.Random("essay")

    def thing() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"

    return tuple(f"The {thing()} may {rng.choice(VERBS)} the {thing()}." for _ in range(ESSAY))


@dataclass(frozen=True)
class Needles:
    """A needle task: keys and values are words, numbers or uuids; the haystack is noise, essay or needle."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    count: int = 1
    values_each: int = 1
    queries: int = 1

    def __call__(self, rng: random.Random, length: int, size: int, essay: Sequence[str]) -> Example:
        """An example whose haystack has `size` sentences."""
        used: set[str] = set()
        each = range(self.values_each)
        values = {_new(rng, self.keys, used): [_draw(rng, self.values) for _ in each] for _ in range(self.count)}
        queries = rng.sample(list(values), self.queries)
        needles = [self._needle(key, value) for key in values for value in values[key]]
        rng.shuffle(needles)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        sentences = [NOISE] * size
        if self.haystack == "essay":
            sentences = [essay[i % len(essay)] for i in range(size)]
        elif self.haystack == "needle":
            sentences = [self._needle(_new(rng, self.keys, used), _draw(rng, self.values)) for _ in range(size)]
        for depth, needle in reversed(list(zip(depths, needles, strict=True))):
            sentences.insert(size * depth // 100, needle)
        context = (" " if self.haystack == "essay" else "\n").join(sentences)
        return self._example(context, queries, [value for key in queries for value in values[key]])

    def _example(self, context: str, queries: list[str], references: list[str]) -> Example:
        query = ", and ".join(part for part in (", ".join(queries[:-1]), queries[-1]) if part)
        one = len(references) == 1
        what, some, be, every = (self.values[:-1], "A", "is", "is") if one else (self.values, "Some", "are", "are all")
        text = (
            f"{some} special magic {what} {be} hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {what} afterwards.\n{context}\nWhat {every} the special magic {what} for {query} mentioned "
            "in the provided text?"
        )
        return Example(text, f" The special magic {what} for {query} mentioned in the provided text {be}", references)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(values=self.values, key=key, value=value)


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _new(rng: random.Random, kind: str, used: set[str]) -> str:
    """A key that was not drawn before. Raises UsageError when half of the pairs of words are used."""
    if kind == "words" and 2 * len(used) > len(ADJECTIVES) * len(NOUNS):
        raise UsageError(f"a text of this length needs more than {len(used)} pairs of words", option="lengths")
    while (drawn := _draw(rng, kind)) in used:
        pass
    used.add(drawn)
    return drawn


def variable_tracking(rng: random.Random, length: int, size: int, essay: Sequence[str]) -> Example:
    """Variables that pass on a value, among `size` lines of noise, after a solved example."""
    solved = _chain(rng, max(1, min(15, length // 128)), letters=3)
    asked = _chain(rng, size, letters=5)
    return asked._replace(text=f"{solved.text}{solved.start} {' '.join(solved.references)}\n\n{asked.text}")


def _chain(rng: random.Random, size: int, letters: int) -> Example:
    value = rng.randint(10000, 99999)
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before} " for before, name in pairwise(names))]
    sentences = [NOISE] * size
    places = sorted(rng.uniform(0, size) for _ in lines)
    for place, line in reversed(list(zip(places, lines, strict=True))):
        sentences.insert(int(place), line)
    context = "\n".join(sentences)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    start = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
        f"assigned the value {value}, they are: "
    )
    return Example(text, start, names)


def common_words(rng: random.Random, length: int, size: int, essay: Sequence[str]) -> Example:
    """A numbered list of `size` different words, ten of which are more frequent, after a solved example."""
    solved = _list(rng, *((20, 3, 1) if length < SHORT else (40, 10, 3)))
    asked = _list(rng, size, *((6, 1) if length < SHORT else (30, 3)))
    return asked._replace(text=f"{solved.text}{solved.start} {_numbered(solved.references)}\n{asked.text}")


def _list(rng: random.Random, size: int, often: int, seldom: int) -> Example:
    words = rng.sample([*NOUNS, *ADJECTIVES, *VERBS], len(NOUNS) + len(ADJECTIVES) + len(VERBS))
    if size > len(words):  # RULER, too, continues with rarer words
        used: set[str] = set()
        words = [_new(rng, "words", used).replace("-", "") for _ in range(size)]
    common, others = words[:COMMON], words[COMMON:size]
    every = common * often + others * seldom
    rng.shuffle(every)
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(every)}\nQuestion: What are the {COMMON} most common words in the above list?"
    )
    return Example(text, f" Answer: The top {COMMON} words that appear most often in the list are:", common)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(rng: random.Random, length: int, size: int, essay: Sequence[str]) -> Example:
    """`size` meaningless words, the k-th with a share of 1 / (k² ζ(2)); the first is dots."""
    words: dict[str, None] = {"...": None}
    while len(words) < max(5, (length - 50) // 50):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    counts = [int(size / (k * k * math.pi**2 / 6)) for k in range(1, len(words) + 1)]
    every = list(chain.from_iterable([word] * count for word, count in zip(words, counts, strict=True)))
    rng.shuffle(every)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(every)}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text?"
    )
    start = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Example(text, start, list(words)[1:4])


class RulerTask(NamedTuple):
    """The maker of examples, the maximum number of tokens of an answer, and the smallest size of an example."""

    make: Maker
    budget: int
    least: int = 1


TASKS = {
    "niah_single_1": RulerTask(Needles("noise"), 128),
    "niah_single_2": RulerTask(Needles("essay"), 128),
    "niah_single_3": RulerTask(Needles("essay", values="uuids"), 128),
    "niah_multikey_1": RulerTask(Needles("essay", count=4), 128),
    "niah_multikey_2": RulerTask(Needles("needle"), 128),
    "niah_multikey_3": RulerTask(Needles("needle", keys="uuids", values="uuids"), 128),
    "niah_multivalue": RulerTask(Needles("essay", values_each=4), 128),
    "niah_multiquery": RulerTask(Needles("essay", count=4, queries=4), 128),
    "vt": RulerTask(variable_tracking, 30),
    "cwe": RulerTask(common_words, 120, COMMON + 1),
    "fwe": RulerTask(frequent_words, 50, 53),  # from this size on the fifth word is rarer than the fourth
}
DOWNLOADED = {"qa_1": 32, "qa_2": 32}  # budgets of the questions from SQuAD and HotpotQA, for which RULER makes files
