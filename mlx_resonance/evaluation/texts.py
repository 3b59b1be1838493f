"""Documents from local files: plain text, JSON lines, parquet, one after the other."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import sha256

TEXT, LINES, TABLE = (".txt", ".md", ".tex", ".py"), (".jsonl", ".ndjson"), (".parquet",)


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
            _parquet(path)


def data_digest(paths: Sequence[Path], field: str) -> str:
    """What the documents depend on: the content of the files in their order, how they are read, the field."""
    parts = [field, *(f"{sha256(path)} {path.suffix.lower() in TEXT}" for path in paths)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_documents(paths: Sequence[Path], field: str) -> Iterator[str]:
    """The texts of all files, read as they are asked for.

    Args:
        paths: text files are one document each, every line of JSON lines and every row of a parquet table is one.
        field: the key or the column of the text; blank lines of JSON lines are passed over.

    Raises:
        ValueError: a file is no UTF-8, no JSON, no parquet, or has a document without text; the place is named.
    """
    for path in paths:
        kind = path.suffix.lower()
        if kind in TEXT:
            yield _decode(path.read_bytes(), str(path))
        else:
            yield from _lines(path, field) if kind in LINES else _rows(path, field)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[perplexity] {where} is not UTF-8 text: {error}") from None


def _lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not data.strip():
                continue
            try:
                entry = json.loads(_decode(data, where))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"[perplexity] {where} is not JSON: {error}") from None
            yield _text(entry.get(field) if isinstance(entry, dict) else None, where, field)


def _rows(path: Path, field: str) -> Iterator[str]:
    pyarrow = _parquet(path)
    try:
        with pyarrow.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"[perplexity] {path} has no column {field!r}: --field must be one of {names}")
            number = 0
            for batch in file.iter_batches(batch_size=16, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text(value, f"{path}, row {number}", field)
    except ValueError as error:  # pyarrow's own errors are some of these
        if str(error).startswith("[perplexity]"):
            raise
        raise ValueError(f"[perplexity] {path} is no whole parquet file: {error}") from None


def _text(value: Any, where: str, field: str) -> str:
    # JSON has escapes for halves of characters, which no tokenizer takes.
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"[perplexity] {where} has no {field!r} that is a text (--field names another)")
    return value


def _parquet(path: Path) -> Any:
    """pyarrow.parquet, which only these files need."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(f"[perplexity] {path} needs pyarrow, which is not installed: pip install pyarrow") from None
