"""The SHA-256 of large files, kept in the user's cache folder until the file changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

from platformdirs import user_cache_path

from .storage import sha256

SMALL = 2**22  # bytes: hashing fewer takes less time than opening a file


def content_hash(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    A large file is hashed once: later calls find the result by the file's inode, size and times. One of them is the
    time of the inode's last change, which no program can set.
    """
    before = _state(path)
    if path.stat().st_size < SMALL:
        return sha256(path)
    folder = user_cache_path("mlx-resonance") / "sha256"
    remembered = folder / hashlib.sha256(before.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError):
        found = remembered.read_text()
        if len(found) == 64:
            return found
    digest = sha256(path)
    if _state(path) != before:
        return digest
    temporary = folder / f".{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):  # nowhere to keep it
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(digest)
        os.replace(temporary, remembered)
    return digest


def _state(path: Path) -> str:
    status = path.stat()
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return f"{path.resolve()} {parts}"
