"""JSON lines that killed and later runs go on with: a first line that says what all have in common, then results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path, kind: str) -> tuple[Record, list[Record]]:
    """The header and the results of a file.

    A last line without its end, which a killed run left, is not counted.

    Args:
        path: the file.
        kind: what the results are of; the header has it as a key, whose value is the version, 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such header, or a line is no JSON object.
    """
    lines = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.endswith("\n"):
                    line = json.loads(text)
                    if not isinstance(line, dict):
                        raise ValueError(f"line {number} is no object")
                    lines.append(line)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:  # bytes that are no text, text that is no JSON, a folder
        raise ValueError(f"[{kind}] {path} is no file of {kind} results: {error}") from None
    if not lines or lines[0].get(kind) != 1:
        raise ValueError(f"[{kind}] {path} is no file of {kind} results: its first line must say their settings")
    return lines[0], lines[1:]


def json_lines(kind: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line of any JSON lines that is not blank, from 1 on, and what it says.

    Raises:
        ValueError: a line is no UTF-8, or no JSON; its number is named.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                where = f"[{kind}] {path}, line {number}"
                try:
                    value = json.loads(data.decode("utf-8-sig"))  # Windows' editors put a mark before the first line
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8 text: {error}") from None
                except (ValueError, RecursionError) as error:  # a number of 5000 digits is no JSONDecodeError
                    raise ValueError(f"{where} is not JSON: {error}") from None
                yield number, value


def open_records(path: Path, kind: str, header: Record) -> list[Record]:
    """The results of a file, which is made where it is not there.

    Args:
        path: the file.
        kind: what the results are of.
        header: what they must have in common, for JSON; the file's header gets `kind`, too.

    Raises:
        ValueError: the file is of another kind, or its header differs: the first difference is named.
    """
    header = {kind: 1} | header
    if not path.exists() or path.stat().st_size == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_records(path, [header])
        return []
    found, lines = read_records(path, kind)
    check_same(path, kind, found, header)
    with open(path, "rb+") as file:  # cut off what a killed run left of a line
        whole = file.read()
        if not whole.endswith(b"\n"):
            file.truncate(whole.rfind(b"\n") + 1)
    return lines


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add lines in one write, so that another run's do not get between; they are on the disk before this returns.

    Raises:
        OSError: the disk is full, or another fault of it; the file is as before.
    """
    data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = file.write(data)
            while written < len(data):  # a full disk takes a part first
                written += file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # a device, such as /dev/full, cannot be cut: what came first is the cause
                file.truncate(size)
            raise


def check_same(path: Path, kind: str, found: Record, wanted: Record) -> None:
    """Raise ValueError, naming the first difference, where a file is not of the settings that are wanted now."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    for part in wanted:
        if found.get(part) != wanted[part]:
            name, was, now = _difference(part, found.get(part), wanted[part])
            raise ValueError(
                f"[{kind}] {path} has results of other settings ({name} is {was} there, {now} now): "
                "give the same ones or another --output"
            )


def _difference(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                return _difference(key, found.get(key), wanted.get(key))
    return name, found, wanted
