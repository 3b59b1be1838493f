"""The on-disk KV cache: a prompt that begins like an earlier one is read only from where the two differ."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..files import user_path
from ..rope_config import RopeConfig
from ..rope_types import LONGEST
from ..storage import sha256
from .kv_format import KVBits, KVFormat
from .prompt_folder import ENOUGH, Known, Ledger, PromptFolder, clear, common_prefix, default_folder, entries
from .prompt_segments import MOST_TOKENS, NewSegment, is_rotated, named, read_into

__all__ = [
    "PromptCache", "cache_identity", "cache_key", "cache_name", "clear", "common_prefix", "default_folder", "entries",
]  # fmt: skip

MAX_BYTES = 10 * 10**9
DAYS_WORTH = 10  # times `max_bytes`: the default budget of bytes written in a day
HANDFUL = 1024  # tokens that are not worth a file after a long text

logger = logging.getLogger("mlx_resonance")


class PromptCache:
    """A folder with the keys and values of texts, which processes may share.

    Texts that begin alike share the files of their beginning. Every file is a segment of a text, in the safetensors
    format, named by its key and by hashes of its content. It is written atomically; a damaged one is deleted with a
    warning.

    Args:
        folder: created if it is missing.
        key: from `cache_key`.
        max_bytes: maximum size of all entries; the ends of the least recently used texts are deleted first.
        least: a text with fewer new tokens is not written.
        daily_bytes: maximum number of bytes written in a day (UTC), by all processes; None for 10 times `max_bytes`.
        name: the model's name, for people who list the entries: from `cache_name`.
        beginning: another key, and a number of tokens: texts share their first tokens with those of that key.
        clock: seconds since 1970.

    Raises:
        NotADirectoryError: the folder is a file.
    """

    def __init__(
        self,
        folder: str | Path,
        key: str,
        max_bytes: int = MAX_BYTES,
        *,
        least: int = 0,
        daily_bytes: int | None = None,
        name: str = "",
        beginning: tuple[str, int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.key, self.max_bytes, self.least, self.name = user_path(folder), key, max_bytes, least, name
        self.beginning = beginning
        self._files = PromptFolder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(self.folder, DAYS_WORTH * max_bytes if daily_bytes is None else daily_bytes, clock)
        self._warned = False

    def known(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt `fetch` would give; only headers are read."""
        return self._longest(tokens[:-1]).tokens

    def _longest(self, tokens: Sequence[int]) -> Known:
        return self._files.longest(tokens, self.key, self.beginning)

    def fetch(self, tokens: Sequence[int], cache: list[Any]) -> int:
        """Fill the caches with the longest known beginning of a prompt, at most all but the last token.

        Args:
            tokens: the prompt's token ids.
            cache: one per layer, empty; `step` is the number of tokens that they are allocated for.

        Returns:
            How many tokens they now hold.

        Raises:
            UsageError: a layer has a sliding window.
        """
        self._check_format(cache)
        for layer in cache:  # fail before anything is read, not when it is stored
            named(layer)
        held, known = 0, self._longest(tokens[:-1])
        steps = [layer.step for layer in cache]
        for layer in cache:  # allocated once, for all segments
            layer.step = max(layer.step, known.tokens)
        for segment, count in known.parts():
            try:
                read_into(segment, cache, count)
                os.utime(segment.path)
            except FileNotFoundError:  # another process made room
                break
            except (OSError, ValueError) as error:
                self._files.drop(segment.path, error)
                break
            held = segment.start + count
        for layer, step in zip(cache, steps, strict=True):
            layer.offset, layer.step = held, step
            if not held:
                layer.keys = layer.values = None
        return held

    def store(self, tokens: Sequence[int], cache: list[Any], *, least: int | None = None) -> None:
        """Write what the caches hold and the folder lacks. A full disk is only a warning.

        Args:
            tokens: the text's token ids; those whose keys the caches hold are stored.
            cache: one per layer.
            least: minimum number of new tokens to write. None for the cache's own, and more than a 16th of those that
                the folder has, up to 1024.
        """
        self._check_format(cache)
        length = min(len(tokens), *(layer.offset for layer in cache))
        known = self._longest(tokens[:length])
        worth = max(self.least, min(known.tokens // ENOUGH, HANDFUL) + 1) if least is None else least
        if length - known.tokens < max(1, worth):
            return
        try:
            while known.tokens < length:
                end, key = min(length, known.tokens + MOST_TOKENS), self.key
                if self.beginning is not None and known.tokens < self.beginning[1]:
                    key, end = self.beginning[0], min(end, self.beginning[1])
                if not self._write(tokens, cache, known, end, key):
                    break
                known = self._longest(tokens[:end])
                if known.tokens < end:  # another process made room
                    break
            for segment in known.chain[:-1]:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(segment.path)
            self._files.make_room(self.max_bytes)
        except (OSError, RuntimeError) as error:
            logger.warning("the prompt cache %s cannot be written: %s", self.folder, error)

    def _check_format(self, cache: list[Any]) -> None:
        """Refuse rotated keys under a key for others, and the reverse: their arrays have the same types and shapes."""
        rotated = any(map(is_rotated, cache))
        if rotated != self.key.endswith(ROTATED):
            raise UsageError(f"the key of this prompt cache is for another KV format: kv_rotate is {rotated}")

    def _write(self, tokens: Sequence[int], cache: list[Any], known: Known, end: int, key: str) -> bool:
        """Write a segment after those that are known. Returns False, with a warning, if there is no room for it."""
        parent = known.chain[-1] if known.chain else None
        new = NewSegment(tokens, cache, known.tokens, end, parent, self.name)
        if (size := new.size + sum(segment.size for segment in known.chain)) > self.max_bytes:
            logger.warning("prompt cache: an entry of %d bytes exceeds its limit of %d", size, self.max_bytes)
            return False
        if not self._ledger.take(new.size):
            if not self._warned:
                logger.warning(
                    "prompt cache: today's budget of %d bytes written to %s is used up; nothing is written until "
                    "midnight UTC",
                    self._ledger.limit,
                    self.folder,
                )
            self._warned = True
            return False
        self._warned = False
        temporary = self.folder / f".{uuid.uuid4().hex}.safetensors"
        try:
            temporary.replace(self.folder / f"{key}-{new.write(temporary)}.safetensors")
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True


ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors")  # mlx-lm's
ROTATED = "-rotated"  # ends the key of a rotated KV format


def refuse_changing_angles(rope: RopeConfig, why: str) -> None:
    """Raise UsageError if the angles change with the length of a text: keys of one text would not fit another."""
    if rope.depends_on_length:
        raise _changing_angles(rope, why)


def _changing_angles(rope: RopeConfig, why: str) -> UsageError:
    return UsageError(f"the angles of {rope.rope_type} change with the length of a text: {why}")


def cache_key(
    checkpoint: Checkpoint, kv_bits: KVBits, length: int | None = None, expected: int | None = None, *,
    kv_rotate: bool = False, adapter_path: str | Path | None = None,
) -> str:  # fmt: skip
    """A hash of what keys and values depend on besides the tokens: the model's content, its angles, the KV format.

    Args:
        checkpoint: an opened one.
        kv_bits, kv_rotate: as in `KVFormat.of`.
        adapter_path: of the adapters that the model was loaded with.
        length: tokens of prompt and answer, if the angles may change with it. Texts on the same side of the length
            at which they change have the same key.
        expected: the length that the model was told to `expect`, usually the prompt's; None for `length`.

    Raises:
        UsageError: the angles change with the length of a text, and no length is given; or they change within this
            text; or every text beyond the context before scaling has its own.
    """
    asked, rope = KVFormat.of(kv_bits, kv_rotate), checkpoint.rope
    digest, end = checkpoint.results_digest(asked.value), ROTATED if asked.rotate else ""
    if adapter_path is not None:
        files = [sha256(user_path(adapter_path) / name) for name in ADAPTER_FILES]
        digest = hashlib.sha256(" ".join([digest, *files]).encode()).hexdigest()[:16]
    if not rope.depends_on_length:
        return digest + end
    if length is None:
        raise _changing_angles(rope, "a prompt cache cannot keep its keys")
    first, last = rope.frequencies(min(expected or length, length)), rope.frequencies(length)
    sides = {"short": rope.frequencies(), "long": rope.frequencies(LONGEST)}
    side = next((name for name, frequencies in sides.items() if first == last == frequencies), None)
    if side is None:
        raise _changing_angles(rope, f"a prompt cache cannot keep the keys of {length:,} tokens")
    return hashlib.sha256(f"{digest} {side}".encode()).hexdigest()[:16] + end


def cache_identity(
    checkpoint: Checkpoint, kv_bits: KVBits, length: int | None = None, expected: int | None = None
) -> dict[str, Any]:
    """`key`, `name` and `beginning` of a checkpoint's `PromptCache`; arguments and errors as of `cache_key`.

    A position map that changes nothing within the context shares the texts of the checkpoint without it there.
    """
    own, positions, beginning = (kv_bits, length, expected), checkpoint.rope.positions, None
    if positions is not None and positions.unchanged == positions.trained:
        beginning = cache_key(checkpoint.extended(None), *own), positions.unchanged
    return {"key": cache_key(checkpoint, *own), "name": cache_name(checkpoint), "beginning": beginning}


def cache_name(checkpoint: Checkpoint) -> str:
    """The model's name for `PromptCache`: the hub id, or the whole path of a folder."""
    path = user_path(checkpoint.name)
    return str(path.resolve()) if path.is_dir() else checkpoint.name
