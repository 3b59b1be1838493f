"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within it, a name beside `path` to write to: at the end it becomes `path`, after a fault it is gone."""
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """The name that `whole_file` gives, which a killed run may have left."""
    return path.with_suffix(f".partial{path.suffix}")


@contextlib.contextmanager
def disk_errors(kind: str, path: Path) -> Iterator[None]:
    """Within it, what MLX raises where `path` cannot be written becomes an OSError of one line.

    Args:
        kind: the command, for the message; it goes on with what it has done.
        path: what is written.
    """
    try:
        yield
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"[{kind}] {path} cannot be written ({error}), {free:.0f} MB are free: the same command goes on from here"
        ) from None


def check_new(kind: str, target: Path) -> None:
    """Refuse a name that the folder of a new checkpoint cannot have.

    Raises:
        ValueError: mlx-lm would not find files in it.
        FileExistsError: it is there.
    """
    if glob.escape(str(target)) != str(target):
        raise ValueError(f"[{kind}] {target}: mlx-lm does not find files in a folder with any of *?[ in its name")
    if os.path.lexists(target):
        raise FileExistsError(f"[{kind}] {target} exists: choose another --mlx-path, or delete it")


@contextlib.contextmanager
def whole_folder(kind: str, target: Path, result: str = "") -> Iterator[Path]:
    """Within it, OUT.partial to work in, which no other run is at. After a fault it stays, for another run to go on.

    Args:
        kind: the command, for errors.
        target: OUT, the folder to make.
        result: the name of a folder in OUT.partial which at the end becomes OUT, and the rest goes; empty: all of it.

    Raises:
        FileExistsError: the target exists, another run is at it, or OUT.partial is no folder.
    """
    partial = target.with_name(target.name + ".partial")
    with contextlib.suppress(FileExistsError):
        partial.mkdir(parents=True)
    if partial.is_symlink() or not partial.is_dir():
        raise in_the_way(kind, partial)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process
        except BlockingIOError:
            raise FileExistsError(f"[{kind}] another run is writing {partial}: wait for it to end") from None
        try:
            check_new(kind, target)
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


def in_the_way(kind: str, partial: Path) -> FileExistsError:
    """The error for an OUT.partial that is none of ours."""
    return FileExistsError(f"[{kind}] {partial} is in the way: this is where the work is done")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
