"""Files and folders on disk: atomic writes, locks, outputs that can be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import ANOTHER, FileInTheWayError, UsageError
from .sizes import format_size

SPECIAL_FILES = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # such an error does not say which file could not grow


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Provide a temporary name beside `path` to write to: renamed to `path` at the end, deleted after an error."""
    partial = partial_name(path)
    try:
        with full_disk(path):
            yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    """The temporary name that `atomic_file` uses, which a killed run may have left behind."""
    return path.with_suffix(f".partial{path.suffix}")


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Name the file or folder that is written in the error of a full disk, a quota or a limit of file sizes."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{path} cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what MLX raises when `path` cannot be written into an OSError of one line."""
    try:
        yield
    except RuntimeError as error:
        free = format_size(shutil.disk_usage(path.parent).free)
        raise OSError(
            f"{path} cannot be written ({error}), {free} are free: the same command resumes from here"
        ) from None


def check_new_folder(target: Path) -> None:
    """Refuse a path that a new checkpoint's folder cannot have.

    Raises:
        UsageError: mlx-lm would find no files in it.
        FileInTheWayError: it exists.
        NotADirectoryError, PermissionError: its parent folder cannot be written to.
    """
    if glob.escape(str(target)) != str(target):
        raise UsageError(f"{target}: mlx-lm finds no files in a folder with any of *?[ in its name", option="mlx_path")
    if os.path.lexists(target):
        kind = kind_of(target)
        what = "exists" if kind in ("", "a folder") else f"is {kind}"
        raise FileInTheWayError(f"{target} {what}", remedies=[{"mlx_path": ANOTHER}])
    _check_writable(target)


@contextlib.contextmanager
def atomic_folder(target: Path, result: str = "") -> Iterator[Path]:
    """Provide OUT.partial to work in, locked against other runs; after an error it stays, for a later run to resume.

    Args:
        target: OUT, the folder to make.
        result: the name of a folder in OUT.partial that becomes OUT at the end, while the rest is deleted; if empty,
            all of OUT.partial becomes OUT.

    Raises:
        FileInTheWayError: the target exists, another run holds the lock, or OUT.partial is not a folder.
    """
    partial = target.with_name(target.name + ".partial")
    with contextlib.suppress(FileExistsError):
        partial.mkdir(parents=True)
    if partial.is_symlink() or not partial.is_dir():
        raise in_the_way(partial)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process
        except BlockingIOError:
            raise FileInTheWayError(f"another run is writing {partial}: wait for it to end") from None
        try:
            check_new_folder(target)
        except FileExistsError:  # made by the run that has just ended
            with contextlib.suppress(OSError):
                partial.rmdir()
            raise
        with full_disk(target):
            yield partial
        (partial / result).rename(target)
        if result:
            shutil.rmtree(partial)
        _sync(target.parent)
    finally:
        os.close(descriptor)


def in_the_way(partial: Path) -> FileInTheWayError:
    """The error for an OUT.partial that we did not make."""
    return FileInTheWayError(f"{partial} is in the way: the work is done in a folder of this name")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def check_output(path: Path, option: str = "output") -> None:
    """Refuse, before any work, a path that a result cannot be written to.

    Raises:
        FileInTheWayError: it is a folder, a device, a pipe or a socket.
        NotADirectoryError, PermissionError: its parent folder cannot be written to.
    """
    if kind := kind_of(path):
        raise FileInTheWayError(f"{path} is {kind}: a file is needed", remedies=[{option: ANOTHER}])
    _check_writable(path)


def check_output_folder(path: Path, option: str) -> None:
    """Refuse, before any work, a path that cannot be a folder with results. Raises like `check_output`."""
    if path.exists() and not path.is_dir():
        kind = kind_of(path) or "a file"
        raise FileInTheWayError(f"{path} is {kind}: expected a folder", remedies=[{option: ANOTHER}])
    _check_writable(path)


def check_input(path: Path, option: str) -> None:
    """Raise UsageError for a folder, and for a pipe, a device or a socket: reading it might never end."""
    if kind := kind_of(path):
        raise UsageError(f"{path} is {kind}: a file is needed", option=option)


def kind_of(path: Path) -> str:
    """What is at a path besides a file: "a folder", "a named pipe", …; empty for a file, or if there is nothing."""
    if not path.exists():
        return ""
    mode = path.stat().st_mode
    return next((name for is_kind, name in SPECIAL_FILES.items() if is_kind(mode)), "")


def _check_writable(path: Path) -> None:
    """Refuse what cannot be written: the path itself if it exists, or else the nearest folder above it."""
    whole = path.absolute()
    above = next(place for place in (whole, *whole.parents) if place.exists())
    if above != whole and not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write to {above}")
