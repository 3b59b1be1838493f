"""The folder of the on-disk KV cache: a tree of segments, which texts share; its size; bytes written per day."""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from ..files import user_path
from .prompt_segments import NAME, Segment, read_segment

OLD = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")  # from before texts shared files: not read
PARTIAL = re.compile(r"\.[0-9a-f]{32}\.safetensors")
LEDGER = "written.json"
STALE = 3600  # seconds after which a partial file must be from a killed process
# A segment is read if a 16th of its tokens are of use: every text shares at least the start token with it.
ENOUGH = 16

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class Entry:
    """A text in a folder.

    Args:
        key: hash of the model and the KV format.
        name: the model's name; empty if it is not known.
        tokens: length of the text.
        bytes: size of its files.
        shared: how many of these bytes other texts use, too.
        used: time of the last use, in seconds since 1970.
    """

    key: str
    name: str
    tokens: int
    bytes: int
    shared: int
    used: float


@dataclass(frozen=True)
class Known:
    """The longest beginning of a text that a folder has: segments, each up to where the next begins."""

    chain: tuple[Segment, ...] = ()
    tokens: int = 0

    def parts(self) -> Iterator[tuple[Segment, int]]:
        """Each segment, and how many of its tokens the text begins with."""
        ends = [segment.start for segment in self.chain[1:]] + [self.tokens]
        for segment, end in zip(self.chain, ends, strict=False):  # there may be none
            yield segment, end - segment.start


class PromptFolder:
    """The segments in a folder. Their headers are read once: names are hashes of content. Damaged ones are deleted.

    Args:
        folder: it may be missing.

    Raises:
        NotADirectoryError: it is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"prompt cache {self.folder} is a file: expected a folder")
        self._headers: dict[str, Segment] = {}

    def segments(self, *keys: str) -> list[Segment]:
        """The segments of some keys, or all, by where they begin; those that nothing leads to are deleted."""
        found = {}
        for path in self._files(NAME):
            if not keys or path.stem.rsplit("-", 2)[0] in keys:
                if segment := self._headers.get(path.name) or self._read(path):
                    found[path.name] = segment
        others = {name: segment for name, segment in self._headers.items() if keys and segment.key not in keys}
        self._headers = others | found
        useful: dict[str, Segment] = {}
        for name, segment in sorted(found.items(), key=lambda item: item[1].start):
            parent = useful.get(segment.parent)
            if not segment.parent or (parent and parent.start < segment.start <= parent.end):
                useful[name] = segment
            elif parent or not (self.folder / segment.parent).exists():  # else another process has just written both
                _delete(segment.path)
        return list(useful.values())

    def longest(self, tokens: Sequence[int], key: str, beginning: tuple[str, int] | None = None) -> Known:
        """The longest beginning of a text that is worth reading; `beginning` as of `PromptCache`."""
        keys = {key: len(tokens)} | (dict([beginning]) if beginning else {})  # and how many tokens it is good for
        text = np.array(tokens, np.int64)
        best = Known()
        ways: dict[str, Known] = {"": best}  # up to the end of each segment that the text shares
        for segment in self.segments(*keys):
            above = ways.get(segment.parent)
            if above is None or segment.start > above.tokens:
                continue
            common = common_prefix(text[segment.start : keys[segment.key]], segment.tokens)
            way = Known((*above.chain, segment), segment.start + common)
            ways[segment.path.name] = way
            if common * ENOUGH >= len(segment.tokens) and way.tokens > best.tokens:
                best = way
        return best

    def drop(self, segment: Path, error: Exception) -> None:
        """Delete a damaged file, with a warning."""
        if segment.exists():  # else another process made room
            logger.warning("prompt cache: the entry %s is damaged and was deleted: %s", segment.name, error)
            _delete(segment)

    def make_room(self, max_bytes: int) -> None:
        """Delete what killed processes left, and the ends of the texts that were used least recently."""
        self._sweep()
        sizes = self.sizes()
        total = sum(size for _, size in sizes.values())
        if total <= max_bytes:
            return
        parents = {segment.path.name: segment.parent for segment in self.segments()}
        children: dict[str, int] = defaultdict(int)
        for parent in parents.values():
            children[parent] += 1
        leaves = [(*sizes[name], name) for name in sizes if not children[name]]
        heapq.heapify(leaves)
        while total > max_bytes and leaves:
            _, size, name = heapq.heappop(leaves)
            if not _delete(self.folder / name):
                continue
            total -= size
            before = parents.get(name, "")
            children[before] -= 1
            if not children[before] and before in sizes:
                heapq.heappush(leaves, (*sizes[before], before))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Time of the last use, in nanoseconds since 1970, and bytes of every file, by name."""
        sizes: dict[str, tuple[int, int]] = {}
        for path in (*self._files(NAME), *self._files(OLD)):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[path.name] = status.st_mtime_ns, status.st_size
        return sizes

    def entries(self) -> list[Entry]:
        """The texts, the most recently used first."""
        segments = {segment.path.name: segment for segment in self.segments()}
        leaves = set(segments) - {segment.parent for segment in segments.values()}
        chains: dict[str, list[Segment]] = {}
        users: dict[Path, int] = defaultdict(int)
        for name in leaves:
            chain = [segments[name]]
            while chain[-1].parent:
                chain.append(segments[chain[-1].parent])
            chains[name] = chain
            for segment in chain:
                users[segment.path] += 1
        texts = []
        for chain in chains.values():
            with contextlib.suppress(FileNotFoundError):
                shared = sum(segment.size for segment in chain if users[segment.path] > 1)
                last, whole = chain[0], sum(segment.size for segment in chain)
                texts.append(Entry(last.key, last.model, last.end, whole, shared, last.path.stat().st_mtime))
        return sorted(texts, key=lambda entry: -entry.used)

    def clear(self, wanted: Callable[[Segment], bool] | None = None) -> tuple[int, int]:
        """Delete segments, or everything if None. Returns the number of files and their bytes."""
        self._sweep()
        names = None if wanted is None else {segment.path.name for segment in self.segments() if wanted(segment)}
        files = total = 0
        for name, (_, size) in self.sizes().items():
            if names is None or name in names:
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name).unlink()
                    files, total = files + 1, total + size
        return files, total

    def _read(self, path: Path) -> Segment | None:
        try:
            return read_segment(path)
        except FileNotFoundError:  # another process made room
            return None
        except (OSError, ValueError) as error:
            self.drop(path, error)
            return None

    def _files(self, name: re.Pattern[str]) -> list[Path]:
        try:
            paths = [path for path in self.folder.iterdir() if name.fullmatch(path.name)]
            return [
                path for path in paths if path.is_file() and not path.is_symlink()
            ]  # reading a pipe might never end
        except FileNotFoundError:
            return []

    def _sweep(self) -> None:
        for path in self._files(PARTIAL):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


class Ledger:
    """How many bytes have been written into a folder today (UTC), by all processes: SSDs wear.

    Args:
        folder: an existing one.
        limit: maximum bytes per day.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, limit: int, clock: Callable[[], float] = time.time) -> None:
        self.path, self.limit, self.clock = folder / LEDGER, limit, clock

    def take(self, size: int) -> bool:
        """Count bytes that are to be written. Returns whether today's budget has them; if not, none are counted."""
        today = datetime.fromtimestamp(self.clock(), timezone.utc).date().isoformat()
        with self.path.open("a+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            written = _written(file.read(1000), today) + size
            if written > self.limit:
                return False
            file.truncate(0)
            file.write(json.dumps({"day": today, "bytes": written}) + "\n")
        return True


def _written(text: str, today: str) -> int:
    """Bytes written today, as the ledger says. A damaged one has nothing to say."""
    try:
        said = json.loads(text)
        return max(0, int(said["bytes"])) if said["day"] == today else 0
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return 0


def _delete(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False


def common_prefix(one: Sequence[int] | NDArray[Any], other: Sequence[int] | NDArray[Any]) -> int:
    """The length of the common prefix of two sequences."""
    length = min(len(one), len(other))
    differ = np.nonzero(np.array(one[:length]) != np.array(other[:length]))[0]
    return int(differ[0]) if len(differ) else length


def default_folder() -> Path:
    """The folder of the user's prompts."""
    return user_cache_path("mlx-resonance") / "prompts"


def entries(folder: str | Path) -> list[Entry]:
    """The texts in a folder, the most recently used first; none if it does not exist."""
    return PromptFolder(folder).entries()


def clear(folder: str | Path, key: str | None = None, names: Collection[str] = ()) -> tuple[int, int]:
    """Delete entries; other files stay.

    Args:
        folder: it may be missing.
        key: only those of this model and KV format, from `cache_key`.
        names: only those of a model with one of these names.

    Returns:
        files, bytes: how many were deleted.
    """
    if key is None and not names:
        return PromptFolder(folder).clear()
    return PromptFolder(folder).clear(
        lambda segment: key in (None, segment.key) and (not names or segment.model in names)
    )
