"""Documents from local files: read one after another; errors name the file and the line."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingFileError, UsageError
from ..run_log import check_field, json_lines
from ..storage import sha256

TEXT, LINES, TABLE = (".txt", ".md", ".tex", ".py"), (".jsonl", ".ndjson"), (".parquet",)


def check_files(paths: Sequence[Path]) -> None:
    """Check files before any of them is read.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is empty, or its suffix is unknown; or pyarrow is missing for a parquet file.
    """
    for path in paths:
        if path.suffix.lower() not in TEXT + LINES + TABLE:
            suffixes = ", ".join(TEXT + LINES + TABLE)
            raise UsageError(f"{path}: the suffix must be one of {suffixes}", option="data")
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file", option="data")
        if path.stat().st_size == 0:
            raise UsageError(f"{path} is empty", option="data")
        if path.suffix.lower() in TABLE:
            _parquet(path)


def read_text(path: Path, option: str, characters: int = -1) -> str:
    """The beginning of a text file, or all of it.

    Args:
        path: the file.
        option: the parameter that names it, for errors.
        characters: number of those to read; -1 for all.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is not UTF-8.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file", option=option)
    try:
        with path.open(encoding="utf-8", newline="") as file:  # ends of lines as they are
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}", option=option) from None


def data_digest(paths: Sequence[Path], field: str) -> str:
    """Of what the documents depend on: the content and order of the files, their format, the field."""
    parts = [field, *(f"{sha256(path)} {path.suffix.lower() in TEXT}" for path in paths)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_documents(paths: Sequence[Path], field: str) -> Iterator[str]:
    """The texts of all files, read lazily.

    Args:
        paths: every line of JSON lines and every row of a parquet table is a document, any other file is one document.
        field: the key or the column of the text; blank lines of JSON lines are skipped.

    Raises:
        UsageError: a file is not UTF-8, JSON or parquet, or a document has no text; file and line are named.
    """
    for path in paths:
        if path.suffix.lower() in LINES:
            for number, entry in json_lines(path):
                yield check_field(f"{path}, line {number}", entry, field, str, option="field")
        elif path.suffix.lower() in TABLE:
            yield from _rows(path, field)
        else:
            yield read_text(path, "data")


def _rows(path: Path, field: str) -> Iterator[str]:
    for _, row in read_columns(path, [field], "field"):
        yield row[field]


def read_columns(path: Path, fields: Sequence[str], option: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The place of each row of a parquet file, for errors, and its texts in some columns.

    Args:
        path: the file.
        fields: names of columns.
        option: the parameter that a missing column is about.

    Raises:
        UsageError: it is not parquet, or has no such column, or a value is not text.
    """
    pyarrow = _parquet(path)
    try:
        with pyarrow.ParquetFile(path) as file:
            for field in fields:
                if field not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names)
                    raise UsageError(f"{path} has no column {field!r}; its columns are {names}", option=option)
            number = 0
            for batch in file.iter_batches(batch_size=16, columns=list(fields)):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    yield where, {field: check_field(where, row, field, str, option=option) for field in fields}
    except UsageError:
        raise
    except ValueError as error:  # pyarrow's own errors are some of these
        broken = "data" if option == "field" else option
        raise UsageError(f"{path} is not a whole parquet file: {error}", option=broken) from None


def _parquet(path: Path) -> Any:
    """pyarrow.parquet, which only these files need."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(f"{path} needs pyarrow, which is not installed: pip install pyarrow", option="data") from None
