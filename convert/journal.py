"""Where a conversion is made: OUT.partial/ with a journal, from which a killed run resumes.

The journal is conversion.json. It names the source, the settings and the finished weight files with their SHA-256; it
stays in the result as the record of how that was made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mlx_resonance.errors import MissingFileError, UsageError
from mlx_resonance.files import WEIGHTS, read_json
from mlx_resonance.storage import atomic_file, atomic_folder, in_the_way, partial_name, sha256

NAME = "conversion.json"
MAX_RECORD = 2**24  # bytes


@dataclass
class Journal:
    """The record of one conversion, in OUT.partial: `source`, `settings`, and the `weights` that are finished."""

    folder: Path
    record: dict[str, Any]

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every finished weight file."""
        weights: dict[str, dict[str, Any]] = self.record["weights"]
        return weights

    def write(self) -> None:
        """Write the journal, in one rename."""
        ordered = self.record | {"weights": dict(sorted(self.finished.items()))}
        with atomic_file(self.folder / NAME) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(ordered, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def workspace(
    target: Path,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    restart: bool = False,
    keep: str | None = None,
) -> Iterator[Journal]:
    """A folder beside the target that becomes the target at the end, by one rename. An error leaves what is done.

    Args:
        target: the folder to make.
        source: its name, and its commit or the `fingerprint` of its files.
        settings: everything else that decides the bytes of the result.
        restart: delete what an earlier run has left.
        keep: name of a folder in OUT.partial that an earlier run may have left and this one uses again.

    Yields:
        The journal: new, or that of the earlier run with the same source and settings.

    Raises:
        FileInTheWayError: the target exists, another run is writing it, or OUT.partial is not a conversion's.
        UsageError: the earlier run had another source or other settings, or its result failed verification.
    """
    with atomic_folder(target) as partial:
        yield _open(partial, {"source": dict(source), "settings": dict(settings), "weights": {}}, restart, keep)


def fingerprint(files: list[Path], known: Mapping[str, str]) -> dict[str, str]:
    """For each file its size, time and a digest, which tell whether it has changed.

    Of some files, a digest of what was read already is `known`, by name; the others are small, and hashed.
    """
    result = {}
    for path in files:
        status = path.stat()
        modified = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat()
        content = known.get(path.name) or sha256(path)[:16]
        result[path.name] = f"{status.st_size} bytes of {modified}, digest {content}"
    return result


def _open(partial: Path, wanted: dict[str, Any], restart: bool, keep: str | None) -> Journal:
    names = {path.name for path in partial.iterdir()}
    journal = Journal(partial, wanted)
    # Killed before its journal was there, a run leaves an empty folder, or a part of the journal.
    if not names <= {partial_name(Path(NAME)).name}:
        try:
            earlier = read_record(partial)
        except (OSError, ValueError):
            raise in_the_way(partial) from None
        if not restart:
            for part in ("source", "settings"):
                _compare(partial, part, earlier[part], wanted[part])
            if "refused" in earlier:
                raise UsageError(
                    f"{partial} failed its verification ({earlier['refused']})", remedies=[{"restart": True}]
                )
            for name, entry in earlier["weights"].items():
                path = partial / name
                if path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]:
                    journal.finished[name] = entry
    for path in partial.iterdir():  # unfinished files of a killed run
        if path.name not in journal.finished and path.name != NAME and (restart or path.name != keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    journal.write()
    return journal


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a conversion, finished or not.

    Raises:
        MissingFileError: there is none.
        UsageError: it is not one that `convert` has written, or it was edited.
    """
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise MissingFileError(f"{folder} has no {NAME}: expected a folder that convert has written")
    record = read_json(path, MAX_RECORD)
    right = all(isinstance(record.get(part), dict) for part in ("source", "settings", "weights"))
    if not right or not all(_is_entry(name, entry) for name, entry in record["weights"].items()):
        raise UsageError(f"{path} is not the record of a conversion")
    return record


def _is_entry(name: str, entry: Any) -> bool:
    """Whether this can be what a record says of a weight file."""
    if not fnmatch(name, WEIGHTS) or Path(name).name != name or not isinstance(entry, dict):
        return False
    errors = entry.get("quantization_error", {})
    return (
        type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and isinstance(errors, dict)
        and all(error is None or isinstance(error, (int, float)) for error in errors.values())
    )


def _compare(partial: Path, part: str, earlier: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in [*wanted, *(set(earlier) - set(wanted))]:
        before, now = earlier.get(key), wanted.get(key)
        if before != now:
            raise UsageError(
                f"{partial} was started with {part} {key} = {json.dumps(before)}, now it is {json.dumps(now)}; "
                "repeat the former or start again",
                remedies=[{"restart": True}],
            )
