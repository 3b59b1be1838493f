"""MRCR (OpenAI 2025): find the i-th of several like answers in a long conversation, and repeat it word by word.

A row is asked at the smallest given length that holds its conversation, rendered with the model's own chat template,
and 1024 tokens of answer; OpenAI counts conversation and answer in tokens of its own.

Source: the card of the data set openai/mrcr (fields, how answers are graded).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..run_log import Record, check_field, json_lines
from .own_files import lengths_of, load_tokenizer, path_in, test_split, tokenizer_of
from .texts import read_columns

BUDGET = 1024  # tokens of an answer, as in mrcr.yaml
FIELDS = ("prompt", "answer", "random_string_to_prepend")


def read(**metadata: Any) -> dict[str, Any]:
    """The rows of a file, as prompts.

    Args:
        metadata: `mrcr`, a parquet file or JSON lines; the lengths, and the tokenizer.

    Raises:
        UsageError: the file is not MRCR's, or the tokenizer has no chat template.
    """
    lengths, tokenizer = lengths_of(metadata, "mrcr"), load_tokenizer(tokenizer_of(metadata))
    path = path_in(metadata, "mrcr")
    if not tokenizer.chat_template:
        raise UsageError("MRCR's prompts are conversations, and the tokenizer has no chat template")
    documents = []
    for where, row in _rows(path):
        text = tokenizer.apply_chat_template(
            _messages(where, row["prompt"]), tokenize=False, add_generation_prompt=True
        )
        tokens = len(tokenizer(text, add_special_tokens=False).input_ids) + BUDGET
        length = next((length for length in lengths if tokens <= length), None)
        if length is not None:
            documents.append({"prompt": text, "answer": row["answer"], "start": row[FIELDS[2]], "max_length": length})
    return test_split(documents, "mrcr", lengths)


def _rows(path: Path) -> Iterator[tuple[str, Record]]:
    if path.suffix == ".parquet":
        yield from read_columns(path, FIELDS, "metadata")
        return
    for number, row in json_lines(path):
        where = f"{path}, line {number}"
        yield where, {name: check_field(where, row, name, str, option="metadata") for name in FIELDS}


def _messages(where: str, text: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(text)
        return [{"role": str(message["role"]), "content": str(message["content"])} for message in messages]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UsageError(f"{where}: the prompt is not a list of messages in JSON", option="metadata") from None


def score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """How much an answer is like the right one, 0 to 1; 0 if it does not begin as it was told to."""
    said, start = results[0], document["start"]
    ratio = 0.0
    if said.startswith(start):
        ratio = SequenceMatcher(None, said.removeprefix(start), document["answer"].removeprefix(start)).ratio()
    return {"ratio": ratio, str(document["max_length"]): ratio}
