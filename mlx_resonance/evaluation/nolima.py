"""NoLiMa (Modarressi et al. 2025, arXiv 2502.05167): find a fact in a book that shares no words with the question.

A length is the number of tokens of book, as in the paper; the question, the fact and the answer come on top.

Source: adobe-research/NoLiMa, evaluation/run_tests.py and data/book_haystack.py (where facts lie, which characters they
are about, how answers are scored), by their behavior. What differs here: books come in the order of their names, the
rows of a length in a random one, so that the first of them are of all kinds; sets with distractors are refused.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..run_log import Record
from .own_files import lengths_of, load_tokenizer, path_in, test_split, tokenizer_of
from .texts import read_text

DEPTHS = 26  # places of a fact, from the beginning of the text to its end
SEED = 42  # of the characters, plus the set's number and the book's
TEMPLATE = (
    "You will answer a question based on the following book snippet:\n\n{haystack}\n\nUse the information provided in "
    "the book snippet to answer the question. Your answer should be short and based on either explicitly stated facts "
    "or strong, logical inferences.\n\nQuestion: {question}\n\n Return only the final answer with no additional "
    "explanation or reasoning."
)


class Fact(NamedTuple):
    """A fact and a question about it; `answers` is None if the characters are the answers."""

    needle: str
    question: str
    template: str
    answers: list[str] | None
    characters: list[str]
    seed: int


def read(**metadata: Any) -> dict[str, Any]:
    """A row for every length, book, fact, question and depth.

    Args:
        metadata: `nolima_needles`, a needle set; `nolima_haystacks`, a folder of books; the lengths, and the tokenizer.

    Raises:
        UsageError: a file is missing or wrong, or a book is too short.
    """
    lengths, tokenizer = lengths_of(metadata, "nolima"), tokenizer_of(metadata)
    tests = read_tests(path_in(metadata, "nolima_needles"))
    folder = path_in(metadata, "nolima_haystacks", folder=True)
    books = sorted(path for path in folder.iterdir() if path.suffix == ".txt")
    documents: list[Record] = []
    for length in lengths:
        rows: list[Record] = []
        for number, book in enumerate(books):
            if len(tokens_of(book, tokenizer)[0]) <= length:
                raise UsageError(f"{book} has no {length} tokens to hide a fact in", option="lengths")
            common = {"book": str(book), "tokenizer": tokenizer, "max_length": length}
            rows += [common | row for test in tests for row in _at_depths(test, number)]
        random.Random(SEED).shuffle(rows)
        documents += rows
    return test_split(documents, "nolima", lengths)


def read_tests(path: Path) -> list[Fact]:
    """The facts and questions of a needle set. Raises UsageError where it is none, or has distractors."""
    try:
        return [test for entry in json.loads(read_text(path, "metadata")) for test in _tests(entry)]
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        why = f"{path} is not a needle set of NoLiMa: {type(error).__name__}: {error}"
        raise UsageError(why, option="metadata") from None


def _tests(entry: Mapping[str, Any]) -> Iterator[Fact]:
    if "distractors" in entry:
        raise UsageError("a needle set with distractors cannot be asked here", option="metadata")
    for asked in entry["questions"].values():
        for test in entry["tests"].values():
            needle, question = entry["needle"], asked
            for number, word in enumerate(test["input_args"], 1):
                needle, question = (text.replace(f"{{{number}}}", word) for text in (needle, question))
            answers = None if "{CHAR}" in needle else test["gold_answers"]
            answers = [answers] if isinstance(answers, str) else answers
            template, characters = entry.get("task_template", TEMPLATE), entry.get("character_set", [])
            yield Fact(needle, question, template, answers, characters, SEED + int(entry["id"][:4]))


def _at_depths(test: Fact, book: int) -> Iterator[Record]:
    numbers = np.random.RandomState(test.seed + book)
    for depth in np.linspace(0, 100, DEPTHS):
        name = str(numbers.choice(test.characters)) if "{CHAR}" in test.needle else ""
        texts = {"needle": test.needle.replace("{CHAR}", name), "question": test.question.replace("{CHAR}", name)}
        answers = [name] if test.answers is None else test.answers
        yield texts | {"template": test.template, "answers": answers, "depth": float(depth) / 100}


@lru_cache(maxsize=8)
def tokens_of(book: Path, tokenizer: str) -> tuple[list[int], NDArray[np.int64]]:
    """The tokens of a book, and the places where a fact may lie: its beginning, and every token with an end of line."""
    loaded = load_tokenizer(tokenizer)
    ids = loaded.encode(read_text(book, "metadata"), add_special_tokens=False)
    ends = {token for token in set(ids) if "\n" in loaded.decode([token])}
    return ids, np.array([0, *(place for place, token in enumerate(ids) if token in ends and place)])


def prompt(document: Mapping[str, Any]) -> str:
    """The part of a book with the fact in it, and the question."""
    loaded, length, depth = load_tokenizer(document["tokenizer"]), document["max_length"], document["depth"]
    ids, places = tokens_of(Path(document["book"]), document["tokenizer"])
    after = places[places / (length + 1) >= depth]
    place = int(after[0]) if len(after) else int(places[-1])
    begin = max(0, place - round(length * depth))
    head = loaded.decode(ids[begin : place + 1])
    text = (
        f"{head[: max(head.rfind(chr(10)), 0)]} {document['needle']}\n{loaded.decode(ids[place + 1 : begin + length])}"
    )
    return str(document["template"].format(haystack=text, question=document["question"]))


def score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer contains one of the right ones."""
    found = float(any(answer in results[0] for answer in document["answers"]))
    return {"contains": found, str(document["max_length"]): found}
