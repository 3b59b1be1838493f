"""The on-disk KV cache: a prompt that begins like an earlier one is read only from where the two differ."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..checkpoint import Checkpoint
from ..errors import UsageError
from ..files import read_header, user_path
from ..rope_config import RopeConfig
from ..storage import sha256

NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")  # hash of model and format; of content
# An entry is written if its new tokens are more than a 16th of those read from another entry, and read if a 16th of its
# tokens are of use: every prompt shares at least the start token with it.
ENOUGH = 16
STALE = 3600  # seconds after which a partial file must be from a killed process

logger = logging.getLogger("mlx_resonance")


class PromptCache:
    """A folder with the keys and values of prompts, which processes may share.

    Every entry is a safetensors file, named by its key and by the SHA-256 of its content. It is written atomically; a
    damaged one is deleted with a warning.

    Args:
        folder: created if it is missing.
        key: from `cache_key`.
        max_bytes: maximum size of all entries; the least recently used are deleted first.

    Raises:
        NotADirectoryError: the folder is a file.
    """

    def __init__(self, folder: str | Path, key: str, max_bytes: int = 10 * 10**9) -> None:
        self.folder, self.key, self.max_bytes = user_path(folder), key, max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"prompt cache {self.folder} is a file: expected a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._used: Path | None = None
        self._used_tokens = 0

    def fetch(self, tokens: Sequence[int], cache: list[Any]) -> int:
        """Fill the caches with the longest beginning of a prompt that an entry has, at most all but the last token.

        Args:
            tokens: the prompt's token ids.
            cache: one per layer, empty.

        Returns:
            How many tokens they now hold.
        """
        for layer in cache:  # fail before anything is read, not when it is stored
            named(layer)
        self._used, self._used_tokens = None, 0
        best: tuple[int, Path] | None = None
        for path in sorted(self.folder.glob(f"{self.key}-*.safetensors")):
            stored = self._tokens_of(path)
            common = common_prefix(tokens[:-1], stored)
            if common * ENOUGH >= len(stored) and common > (best[0] if best else 0):
                best = common, path
        if best is None:
            return 0
        length, path = best
        try:
            if sha256(path)[:32] != path.stem.split("-")[1]:
                raise ValueError("its content has changed")
            arrays: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
            for i, layer in enumerate(cache):
                fill(layer, {name: value for name, value in arrays.items() if name.startswith(f"{i}.")}, length)
            mx.eval([layer.state for layer in cache])
            os.utime(path)
        except FileNotFoundError:  # another process made room
            return self._empty(cache)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            self._drop(path, error)
            return self._empty(cache)
        self._used, self._used_tokens = path, length
        return length

    def store(self, tokens: Sequence[int], cache: list[Any]) -> None:
        """Store what the caches hold if it is more than the entry that was used. A full disk is only a warning.

        Args:
            tokens: the text's token ids; those whose keys the caches hold are stored.
            cache: one per layer.
        """
        length = min(len(tokens), *(layer.offset for layer in cache))
        if length - self._used_tokens <= self._used_tokens // ENOUGH:
            return
        arrays = {"tokens": mx.array(np.array(tokens[:length], np.int32))}
        for i, layer in enumerate(cache):
            arrays |= {f"{i}.{name}": value[..., :length, :] for name, value in named(layer)}
        if (size := sum(value.nbytes for value in arrays.values())) > self.max_bytes:
            logger.warning("prompt cache: an entry of %d bytes exceeds its limit of %d", size, self.max_bytes)
            return
        temporary = self.folder / f".{uuid.uuid4().hex}.safetensors"
        try:
            mx.save_safetensors(str(temporary), arrays, {"format": "mlx"})
            path = self.folder / f"{self.key}-{sha256(temporary)[:32]}.safetensors"
            temporary.replace(path)
            if self._used is not None and self._used != path and self._used_tokens == len(self._tokens_of(self._used)):
                self._used.unlink(missing_ok=True)  # the new entry includes it
            self._used, self._used_tokens = path, length
            self._make_room()
        except (OSError, RuntimeError) as error:
            logger.warning("the prompt cache %s cannot be written: %s", self.folder, error)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _tokens_of(self, path: Path) -> list[int]:
        """The tokens of an entry; none if it is damaged or gone."""
        try:
            if "tokens" not in read_header(path):
                raise ValueError("it has no tokens")
            return list(np.array(mx.load(str(path))["tokens"]))  # type: ignore[call-overload]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            self._drop(path, error)
            return []

    def _drop(self, path: Path, error: Exception) -> None:
        if not path.exists():  # another process made room
            return
        logger.warning("prompt cache: the entry %s is damaged and was deleted: %s", path.name, error)
        with contextlib.suppress(OSError):
            path.unlink()

    def _empty(self, cache: list[Any]) -> int:
        for layer in cache:
            layer.keys = layer.values = None
            layer.offset = 0
        return 0

    def _make_room(self) -> None:
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if NAME.fullmatch(path.name):
                    status = path.stat()
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif re.fullmatch(r"\.[0-9a-f]{32}\.safetensors", path.name):
                    if time.time() - path.stat().st_mtime > STALE:
                        path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def refuse_changing_angles(rope: RopeConfig, why: str) -> None:
    """Raise UsageError if the angles change with the length of a text: keys of one text would not fit another."""
    if rope.depends_on_length:
        raise UsageError(f"the angles of {rope.rope_type} change with the length of a text: {why}")


def cache_key(checkpoint: Checkpoint, kv_bits: int | None) -> str:
    """A hash of what keys and values depend on besides the tokens: the model's content, its angles, the KV format.

    Raises:
        UsageError: the angles change with the length of a text.
    """
    refuse_changing_angles(checkpoint.rope, "a prompt cache cannot keep its keys")
    return checkpoint.results_digest(kv_bits)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    length = min(len(one), len(other))
    differ = np.nonzero(np.array(one[:length]) != np.array(other[:length]))[0]
    return int(differ[0]) if len(differ) else length


def named(layer: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a layer's cache by name, each of shape (B, H, L, …)."""
    if not isinstance(layer, (KVCache, QuantizedKVCache)):
        raise UsageError("a prompt cache cannot store layers with a sliding window", option="prompt_cache")
    return tree_flatten({"keys": layer.keys, "values": layer.values})  # type: ignore[return-value]


def fill(layer: Any, arrays: dict[str, mx.array], length: int) -> None:
    """Give an empty cache the first `length` tokens of arrays from `named`, allocated for all that it will hold."""
    for name in ("keys", "values"):
        own = {key.split(".", 1)[1]: value for key, value in arrays.items()}
        parts = [own[name]] if name in own else [own[f"{name}.{i}"] for i in range(3)]
        room = max(layer.step, length)
        whole = []
        for part in parts:
            if part.ndim != 4 or part.shape[2] < length:
                raise ValueError("its arrays are too short")
            empty = mx.zeros((*part.shape[:2], room - length, part.shape[3]), part.dtype)
            whole.append(mx.concatenate([part[..., :length, :], empty], axis=2))
        setattr(layer, name, whole[0] if len(whole) == 1 else tuple(whole))
    layer.offset = length
