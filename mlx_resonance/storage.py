"""Files and folders on disk: atomic writes, locks, outputs that can be written."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import ANOTHER, FileInTheWayError, UsageError

SPECIAL_FILES = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}  # fmt: skip


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Provide a temporary name beside `path` to write to: renamed to `path` at the end, deleted after an error."""
    partial = partial_name(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    """The temporary name that `atomic_file` uses, which a killed run may have left behind."""
    return path.with_suffix(f".partial{path.suffix}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what MLX raises when `path` cannot be written into an OSError of one line."""
    try:
        yield
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"{path} cannot be written ({error}), {free:.0f} MB are free: the same command resumes from here"
        ) from None


def check_new_folder(target: Path) -> None:
    """Refuse a path that a new checkpoint's folder cannot have.

    Raises:
        UsageError: mlx-lm would find no files in it.
        FileInTheWayError: it exists.
    """
    if glob.escape(str(target)) != str(target):
        raise UsageError(f"{target}: mlx-lm finds no files in a folder with any of *?[ in its name", option="mlx_path")
    if os.path.lexists(target):
        raise FileInTheWayError(f"{target} exists", remedies=[{"mlx_path": ANOTHER}])


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
    if path.exists():
        mode = path.stat().st_mode
        for is_kind, name in SPECIAL_FILES.items():
            if is_kind(mode):
                raise FileInTheWayError(f"{path} is {name}: a file is needed", remedies=[{option: ANOTHER}])
        above = path
    else:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(f"{path} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write to {above}")
