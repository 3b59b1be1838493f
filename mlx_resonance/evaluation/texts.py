"""Documents from local files, one after the other, with the place of what is wrong in them."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import sha256
from ..records import json_lines

TEXT, LINES, TABLE = (".txt", ".md", ".tex", ".py"), (".jsonl", ".ndjson"), (".parquet",)
KINDS = {str: "a text", list: "a list of texts", int: "a whole number", float: "a number", bool: "true or false"}


def check_files(paths: Sequence[Path]) -> None:
    """Refuse what can be refused before anything is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or no document can be told from its name; or pyarrow is missing for a parquet file.
    """
    for path in paths:
        if path.suffix.lower() not in TEXT + LINES + TABLE:
            raise ValueError(f"[perplexity] {path}: the suffix must be one of {', '.join(TEXT + LINES + TABLE)}")
        if not path.is_file():
            raise FileNotFoundError(f"[perplexity] {path}: no such file")
        if path.stat().st_size == 0:
            raise ValueError(f"[perplexity] {path} is empty")
        if path.suffix.lower() in TABLE:
            _parquet("perplexity", path)


def data_digest(paths: Sequence[Path], field: str) -> str:
    """What the documents depend on: the content of the files in their order, how they are read, the field."""
    parts = [field, *(f"{sha256(path)} {path.suffix.lower() in TEXT}" for path in paths)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_documents(paths: Sequence[Path], field: str, kind: str = "perplexity") -> Iterator[str]:
    """The texts of all files, read as they are asked for.

    Args:
        paths: every line of JSON lines and every row of a parquet table is a document, any other file is one.
        field: the key or the column of the text; blank lines of JSON lines are passed over.
        kind: what they are for, for errors.

    Raises:
        ValueError: a file is no UTF-8, no JSON, no parquet, or has a document without text; the place is named.
    """
    for path in paths:
        if path.suffix.lower() in LINES:
            for number, entry in json_lines(kind, path):
                yield check_field(f"[{kind}] {path}, line {number}", entry, field, str)
        elif path.suffix.lower() in TABLE:
            yield from _rows(kind, path, field)
        else:
            yield _decode(path.read_bytes(), f"[{kind}] {path}")


def check_field(where: str, entry: Any, name: str, wanted: type) -> Any:
    """What an object has under a name.

    Args:
        where: the object's place, for errors.
        entry: of a file.
        name: the field's.
        wanted: its kind; list for a list of texts that is not empty.

    Raises:
        ValueError: it is missing or something else, or the entry is no object.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not _is(value, wanted):
        raise ValueError(f"{where} has no {name!r} that is {KINDS[wanted]}")
    return value


def check_results(kind: str, path: Path, lines: Sequence[Any], fields: Mapping[str, type]) -> None:
    """Raise ValueError, with its number, where a line of results, header apart, lacks one of the fields."""
    for number, line in enumerate(lines, 2):
        for name, wanted in fields.items():
            check_field(f"[{kind}] {path}, line {number}", line, name, wanted)


def _is(value: Any, wanted: type) -> bool:
    if wanted is list:
        return isinstance(value, list) and value != [] and all(_is(part, str) for part in value)
    if wanted is str:  # JSON has escapes for halves of characters, which no tokenizer takes
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    return type(value) is wanted


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from None


def _rows(kind: str, path: Path, field: str) -> Iterator[str]:
    pyarrow = _parquet(kind, path)
    try:
        with pyarrow.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"[{kind}] {path} has no column {field!r}: there are {names}")
            number = 0
            for batch in file.iter_batches(batch_size=16, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield check_field(f"[{kind}] {path}, row {number}", {field: value}, field, str)
    except ValueError as error:  # pyarrow's own errors are some of these
        if str(error).startswith(f"[{kind}]"):
            raise
        raise ValueError(f"[{kind}] {path} is no whole parquet file: {error}") from None


def _parquet(kind: str, path: Path) -> Any:
    """pyarrow.parquet, which only these files need."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(f"[{kind}] {path} needs pyarrow, which is not installed: pip install pyarrow") from None
