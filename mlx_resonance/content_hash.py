"""The SHA-256 of large files, remembered in the user's cache folder as long as the file has not changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

from platformdirs import user_cache_path

from .storage import sha256

SMALL = 2**22  # bytes that are hashed faster than a file is opened


def content_hash(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    A large file is hashed once: later calls find the result under the file's inode, size and times. The time of the
    last change of the inode is one that no program can set.
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
    with contextlib.suppress(OSError):  # no place to remember it
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(digest)
        os.replace(temporary, remembered)
    return digest


def _state(path: Path) -> str:
    status = path.stat()
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return f"{path.resolve()} {parts}"
