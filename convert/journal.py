"""Where a conversion is made: OUT.partial/ with a journal. A killed run is gone on with; no half is ever a result.

The journal is conversion.json. It names the source, the settings and the finished weight files with their SHA-256; in
the result it stays as the record of how it was made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
    """The record of one conversion, in its folder.

    Args:
        folder: OUT.partial.
        record: what is written: `source`, `settings`, and `weights`, the finished files' bytes and SHA-256.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every finished weight file."""
        weights: dict[str, dict[str, Any]] = self.record["weights"]
        return weights

    def finish(self, name: str, entry: dict[str, Any]) -> None:
        """Note that a weight file is whole."""
        self.finished[name] = entry
        self.write()

    def write(self) -> None:
        """Write the journal, whole or not at all."""
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
        source: what the weights come from: its name, and its commit or what `fingerprint` says of its files.
        settings: what decides every byte of the result.
        restart: drop what an earlier run has left.
        keep: name of a folder in OUT.partial that an earlier run may have left and this one goes on with.

    Yields:
        The journal: new, or that of the earlier run with the same source and settings.

    Raises:
        FileExistsError: the target exists, another run is at it, or OUT.partial is none of ours.
        UsageError: the earlier run had another source or other settings.
    """
    with atomic_folder(target) as partial:
        yield _open(partial, {"source": dict(source), "settings": dict(settings), "weights": {}}, restart, keep)


def fingerprint(files: list[Path]) -> dict[str, str]:
    """What tells whether files have changed, without reading weights: size, time, and the hash of their beginning."""
    result = {}
    for path in files:
        status = path.stat()
        with path.open("rb") as file:
            start = hashlib.sha256(file.read(2**20)).hexdigest()[:16]  # all of a config, the header of a weight file
        modified = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat()
        result[path.name] = f"{status.st_size} bytes of {modified}, beginning {start}"
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
                raise UsageError(f"{partial} was refused ({earlier['refused']}): --restart begins anew")
            for name, entry in earlier["weights"].items():
                path = partial / name
                if path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]:
                    journal.finished[name] = entry
    for path in partial.iterdir():  # what a killed run had not finished
        if path.name not in journal.finished and path.name != NAME and (restart or path.name != keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    journal.write()
    return journal


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a conversion, finished or not.

    Raises:
        MissingFileError: there is none.
        UsageError: it is not one that a run has written. They write it whole: it is somebody else's, or was edited.
    """
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        raise MissingFileError(f"{folder} has no {NAME}: expected a folder that convert has written")
    record = read_json(path, MAX_RECORD)
    wrong = UsageError(f"{path} is no record of a conversion")
    if not all(isinstance(record.get(part), dict) for part in ("source", "settings", "weights")):
        raise wrong
    for name, entry in record["weights"].items():
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise wrong
        errors = entry.get("quantization_error", {})
        if not fnmatch(name, WEIGHTS) or Path(name).name != name:
            raise wrong
        if not isinstance(errors, dict):
            raise wrong
        if not all(error is None or isinstance(error, (int, float)) for error in errors.values()):
            raise wrong
    return record


def _compare(partial: Path, part: str, earlier: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in [*wanted, *(set(earlier) - set(wanted))]:
        before, now = earlier.get(key), wanted.get(key)
        if before != now:
            raise UsageError(
                f"{partial} was begun with {part} {key} = {json.dumps(before)}, now it is {json.dumps(now)}: "
                "use the same as before, or --restart to begin anew"
            )
