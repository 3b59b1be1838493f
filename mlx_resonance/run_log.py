"""The run log: results as JSON lines under a header of their settings, from which a killed run resumes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ANOTHER, MissingFileError, UsageError
from .files import user_path
from .storage import check_output, kind_of

Record = dict[str, Any]
TYPES = {str: "a string", list: "a list of strings", int: "an integer", float: "a number", bool: "true or false"}


class RunLog:
    """Results as JSON lines, one whole line at a time: a killed run resumes from them, a later one adds to them.

    The first line is the header: `{kind: 1, …}` with information for the reader and the settings that all results
    share. Each further line is a result. An unfinished last line, left by a killed run, is dropped. A header without a
    result, left by a run that ended before its first one, binds nobody: another run writes its own.

    Args:
        path: the file; it is created, with its folder, if it does not exist.
        kind: what kind of results the file holds.
        settings: what a result depends on besides its key; compared with the header of an existing file.
        about: written to a new header and never compared, such as the model's name.
        key: the fields that identify a result.
        fields: the types of the fields that every result must have; the key's fields are always required.
        option: the parameter that names the file, for errors.
        begun: whether there is more of the run than this file has, such as a checkpoint: its header then binds without
            a result.

    Raises:
        UsageError: the file has another kind or other settings, and both values of the first difference are named; or
            a line is not a result.
        FileInTheWayError: `path` is a folder or a device.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        settings: Mapping[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        key: Sequence[str],
        fields: Mapping[str, type] | None = None,
        option: str = "output",
        begun: bool = False,
    ) -> None:
        path = user_path(path)
        check_output(path, option)
        self.path, self.kind, self.key, self.option = path, kind, tuple(key), option
        self._size = 0  # bytes of the file that have been read, or written by us
        self._fields = dict(fields or {})
        self.settings: Record = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        path.parent.mkdir(parents=True, exist_ok=True)
        in_use = _claimed_by_others(path)
        with open(path, "ab+", buffering=0) as file, _locked(file):
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._refuse_foreign_end(content[len(whole) :], has_header=bool(whole))
            if whole:
                found, lines = _parse(path, kind, whole, option)
                other = any(found.get(name) != value for name, value in self.settings.items())
                if other and not lines and not begun and not in_use:
                    whole = b""
                else:
                    self._take(whole)
            if len(whole) < len(content):
                file.truncate(len(whole))
            if not whole:
                _write(file, _line({kind: 1} | dict(about or {}) | self.settings))
        self.reload()
        if self._records:
            _give_up_claim(path)

    def reload(self) -> None:
        """Read the results again: another process may have added some."""
        if self.path.stat().st_size != self._size:  # nobody else has written: nothing to read
            self._take(self.path.read_bytes())

    def _take(self, content: bytes) -> None:
        self._size = content.rfind(b"\n") + 1
        self.header, lines = _parse(self.path, self.kind, content, self.option)
        for name in self.settings:
            self._compare(name, self.header.get(name), self.settings[name])
        self._records: dict[tuple[Any, ...], Record] = {}
        for number, line in enumerate(lines, 2):
            where = f"{self.path}, line {number}"
            for name, wanted in self._fields.items():
                check_field(where, line, name, wanted, option=self.option)
            for name in self.key:
                if type(line.get(name)) not in (str, int):
                    raise UsageError(f"{where} has no {name!r} that is a string or an integer", option=self.option)
            self._records[self._key_of(line)] = line

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[Record]:
        """All results, one for each key: the last line with a key counts."""
        return list(self._records.values())

    def find(self, *key: Any, **same: Any) -> Record | None:
        """The result with a key, or None.

        Args:
            key: the values of the fields that identify it.
            same: values that further fields of it must have, such as the digest of the question.

        Raises:
            UsageError: one of those differs; both values are named.
        """
        record = self._records.get(key)
        if record is not None:
            what = ", ".join(f"{name} {value!r}" for name, value in zip(self.key, key, strict=True))
            for name, value in same.items():
                self._compare(name, record.get(name), json.loads(json.dumps(value)), f"another result for {what}")
        return record

    def append(self, *records: Record) -> None:
        """Add results in one write; they are on the disk before this returns.

        Raises:
            OSError: the disk is full or fails; the file is as before.
            UsageError: there is no result yet, and another run has written its own header.
        """
        data = b"".join(map(_line, records))
        with open(self.path, "ab+", buffering=0) as file, _locked(file):
            if not self._records:
                file.seek(0)
                self._take(file.read())
            ours_alone = os.fstat(file.fileno()).st_size == self._size
            _write(file, data)
        if ours_alone:  # else what the others wrote is still to be read
            self._size += len(data)
        self._records |= {self._key_of(record): record for record in records}
        _give_up_claim(self.path)

    def _key_of(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in self.key)

    def _refuse_foreign_end(self, end: bytes, has_header: bool) -> None:
        """Refuse an unfinished last line that does not begin as ours do: we truncate nobody else's file."""
        start = b'{"' if has_header else _line({self.kind: 1})[:-2]
        if end and not (end.startswith(start) or start.startswith(end)):
            raise not_a_run_log(self.path, self.kind, "its last line is not JSON", self.option)

    def _compare(self, name: str, found: Any, wanted: Any, what: str = "results with other settings") -> None:
        if found != wanted:
            name, found, wanted = _difference(name, found, wanted)
            raise UsageError(
                f"{self.path} has {what}: {name} is {_short(found)} there and {_short(wanted)} here",
                remedies=[{self.option: ANOTHER}],
            )


def read_run_log(path: Path, kind: str, option: str = "output") -> tuple[Record, list[Record]]:
    """Read the header and the results of a run log, whatever its settings. An unfinished last line is ignored.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is not a run log of this kind.
    """
    if what := kind_of(path):  # reading a pipe may never end
        raise not_a_run_log(path, kind, f"it is {what}", option)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file", option=option) from None
    except OSError as error:
        raise not_a_run_log(path, kind, str(error), option) from None
    return _parse(path, kind, content, option)


def _parse(path: Path, kind: str, content: bytes, option: str) -> tuple[Record, list[Record]]:
    lines: list[Record] = []
    for number, data in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            raise not_a_run_log(path, kind, f"line {number}: {error}", option) from None
        if not isinstance(line, dict):
            raise not_a_run_log(path, kind, f"line {number} is not an object", option)
        lines.append(line)
    if not lines or lines[0].get(kind) != 1:
        raise not_a_run_log(path, kind, "its first line must hold the settings", option)
    return lines[0], lines[1:]


def not_a_run_log(path: Path, kind: str, why: str, option: str = "output") -> UsageError:
    """The error for a file that holds something else."""
    return UsageError(f"{path} is not a run log of {kind} results: {why}", remedies=[{option: ANOTHER}])


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number (from 1) and the value of each line of a JSON-lines file, except blank ones.

    Raises:
        UsageError: a line is not UTF-8 or not JSON; its number is named.
    """
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                where = f"{path}, line {number}"
                try:
                    value = json.loads(data.decode("utf-8-sig"))  # Windows editors write a byte-order mark
                except UnicodeDecodeError as error:
                    raise UsageError(f"{where} is not UTF-8 text: {error}") from None
                except (ValueError, RecursionError) as error:  # a number of 5000 digits is not a JSONDecodeError
                    raise UsageError(f"{where} is not JSON: {error}") from None
                yield number, value


def check_field(where: str, entry: Any, name: str, wanted: type, option: str | None = None) -> Any:
    """The value of an object's field.

    Args:
        where: the object's place, for errors.
        entry: the object, as read from a file.
        name: the field's name.
        wanted: its type; list means a list of strings that is not empty.
        option: the parameter that names the file, for errors.

    Raises:
        UsageError: the field is missing or has another type, or the entry is not an object.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not _is(value, wanted):
        raise UsageError(f"{where} has no {name!r} that is {TYPES[wanted]}", option=option)
    return value


def _is(value: Any, wanted: type) -> bool:
    if wanted is list:
        return isinstance(value, list) and value != [] and all(_is(part, str) for part in value)
    if wanted is str:  # JSON can escape lone surrogates, which no tokenizer accepts
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    return type(value) is wanted


@contextlib.contextmanager
def _locked(file: Any) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel drops with the process; none on file systems without locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file unlocks it


_claims: dict[Path, Any] = {}  # the lock files that this process keeps open


def _claimed_by_others(path: Path) -> bool:
    """Claim a run log until it has a result or this process ends; whether another process has claimed it, too.

    A lock of the process, not of an open file: a failed run in a notebook is no other process. It is on a file of its
    own, since closing any handle of a file gives up all such locks on it. Where there are no locks, nobody claims.
    """
    lock = _lock_of(path)
    with contextlib.suppress(OSError):
        file = _claims[lock] = _claims.get(lock) or lock.open("ab+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            others = False
        except OSError as error:
            others = error.errno in (errno.EACCES, errno.EAGAIN)
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return others
    return False


def _give_up_claim(path: Path) -> None:
    """A log with results binds by itself: neither a file that is open nor one on the disk is left of the claim."""
    if (file := _claims.pop(lock := _lock_of(path), None)) is not None:
        with contextlib.suppress(OSError):
            file.close()
            lock.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mlx-resonance-{name}.lock"


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate
        return (json.dumps(record, allow_nan=False) + "\n").encode()


def _write(file: Any, data: bytes) -> None:
    """Append to an unbuffered file and sync it; after an error the file is as before."""
    size = os.fstat(file.fileno()).st_size
    try:
        written = file.write(data)
        while written < len(data):  # a full disk may accept a part first
            written += file.write(data[written:])
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):  # truncating may fail too: the first error is the cause
            file.truncate(size)
        why = f"{file.name} cannot be written ({error.strerror}): the same command resumes from here"
        raise OSError(why) from None


def _difference(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The first difference between two values, looking inside objects."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                return _difference(key, found.get(key), wanted.get(key))
    return name, found, wanted


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
