"""Files of the on-disk KV cache: keys and values of a part of a text, written and read without a second copy."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from .._mlx_lm import KVCache, QuantizedKVCache
from ..errors import UsageError
from ..files import ITEM_SIZES, TensorInfo

# Hash of model and format; of the file's header; of its data.
NAME = re.compile(r"(.+)-([0-9a-f]{32})-([0-9a-f]{32})\.safetensors")
VERSION = "1"
MAX_HEADER = 2**24  # bytes of JSON
MOST_TOKENS = 2**21  # of a segment: base64 makes 11 MiB of them
BLOCK = 2**22  # bytes copied at once
# safetensors' names of the types, and the NumPy type of the same size: NumPy has no bfloat16.
TYPES: dict[str, tuple[mx.Dtype, mx.Dtype, str]] = {
    "F32": (mx.float32, mx.float32, "<f4"),
    "F16": (mx.float16, mx.float16, "<f2"),
    "BF16": (mx.bfloat16, mx.uint16, "<u2"),
    "U32": (mx.uint32, mx.uint32, "<u4"),
}
NAMES = {kind: name for name, (kind, *_) in TYPES.items()}


@dataclass(frozen=True, eq=False)
class Segment:
    """What the header of a segment's file says.

    Args:
        path: the file.
        model: the model's name, for people.
        parent: name of the file with the tokens before it; empty if it begins the text.
        start: number of tokens of the text before it.
        tokens: its own, int32.
        arrays: by their names, in the order of their data, each of shape (1, H, L, …).
        data: where their data begins.
        size: bytes of the file.
    """

    path: Path
    model: str
    parent: str
    start: int
    tokens: NDArray[np.int32]
    arrays: dict[str, TensorInfo]
    data: int
    size: int

    @property
    def key(self) -> str:
        """Hash of the model and the KV format."""
        return self.path.stem.rsplit("-", 2)[0]

    @property
    def end(self) -> int:
        """Number of tokens of the text up to its end."""
        return self.start + len(self.tokens)


def is_rotated(layer: Any) -> bool:
    """Whether a layer's cache has a rotated KV format."""
    return bool(getattr(getattr(layer, "format", None), "rotate", False))


def named(layer: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a layer's cache by name, each of shape (1, H, L, …).

    Raises:
        UsageError: it drops tokens, or holds several texts.
    """
    if not isinstance(layer, (KVCache, QuantizedKVCache)):
        raise UsageError("a prompt cache cannot store layers with a sliding window", option="prompt_cache")
    arrays: list[tuple[str, mx.array]] = tree_flatten({"keys": layer.keys, "values": layer.values})  # type: ignore[assignment]
    if any(array is not None and array.shape[0] != 1 for _, array in arrays):
        raise UsageError("a prompt cache stores one text at a time", option="prompt_cache")
    return arrays


class NewSegment:
    """A segment that is to be written: its size is known before anything is.

    Args:
        tokens: of the whole text.
        cache: one per layer.
        start, end: the tokens that it takes.
        parent: the segment before it; None if it begins the text.
        model: the model's name, for people.
    """

    def __init__(
        self, tokens: Sequence[int], cache: list[Any], start: int, end: int, parent: Segment | None, model: str
    ) -> None:
        self.cache, self.start, self.end = cache, start, end
        entries: dict[str, Any] = {
            "__metadata__": {
                "format": "mlx",
                "segment": VERSION,
                "model": model,
                "parent": "" if parent is None else parent.path.name,
                "start": str(start),
                "tokens": base64.b64encode(np.array(tokens[start:end], "<i4").tobytes()).decode(),
            }
        }
        offset = 0
        for i, layer in enumerate(cache):
            for name, array in named(layer):
                shape = (*array.shape[:2], end - start, array.shape[3])
                info = TensorInfo(NAMES[array.dtype], shape)
                place = [offset, offset := offset + info.nbytes]
                entries[f"{i}.{name}"] = {"dtype": info.dtype, "shape": shape, "data_offsets": place}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # as safetensors aligns the data
        self.header = len(header).to_bytes(8, "little") + header
        self.size = len(self.header) + offset

    def write(self, path: Path) -> str:
        """Write the file, a block at a time. Returns the part of its name that depends on its content."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            file.write(self.header)
            for layer in self.cache:
                for _, array in named(layer):
                    for block in _blocks(array, self.start, self.end):
                        digest.update(block)
                        file.write(block)
        return f"{hashlib.sha256(self.header).hexdigest()[:32]}-{digest.hexdigest()[:32]}"


def _blocks(array: mx.array, start: int, end: int) -> Iterator[memoryview]:
    """The bytes of some tokens of an array, head by head: within a head, they lie side by side in memory already."""
    plain = array.view(TYPES[NAMES[array.dtype]][1])
    for head, first, last in _steps(array.shape[1], end - start, array.shape[3] * array.dtype.size):
        block: NDArray[Any] = np.asarray(plain[0, head, start + first : start + last])
        yield np.ascontiguousarray(block).data.cast("B")


def _steps(heads: int, tokens: int, row: int) -> Iterator[tuple[int, int, int]]:
    step = max(1, BLOCK // max(1, row))
    for head in range(heads):
        for first in range(0, tokens, step):
            yield head, first, min(first + step, tokens)


def read_segment(path: Path) -> Segment:
    """Read and check a file's header; `read_into` checks its data.

    Raises:
        ValueError: the file is damaged, or not a segment.
        OSError: it cannot be read.
    """
    found = NAME.fullmatch(path.name)
    if found is None:
        raise ValueError("its name is not a segment's")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(prefix := file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError("its header has the wrong size")
        header = file.read(length)
    if hashlib.sha256(prefix + header).hexdigest()[:32] != found[2]:
        raise ValueError("its header has changed")
    try:
        return _parsed(path, json.loads(header), 8 + length, size)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # made by someone else
        raise ValueError(f"its header is not a segment's: {type(error).__name__}") from None


def _parsed(path: Path, entries: dict[str, Any], data: int, size: int) -> Segment:
    said = entries.pop("__metadata__")
    if said["segment"] != VERSION:
        raise ValueError("it has another format")
    tokens = np.frombuffer(base64.b64decode(said["tokens"], validate=True), "<i4")
    arrays, at = {}, 0
    for name, entry in entries.items():
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
        right = info.dtype in TYPES and len(info.shape) == 4 and all(type(axis) is int for axis in info.shape)
        if not right or min(info.shape) < 1 or (info.shape[0], info.shape[2]) != (1, len(tokens)):
            raise ValueError("its arrays do not fit its tokens")
        if entry["data_offsets"] != [at, at := at + info.nbytes]:
            raise ValueError("its data has gaps")
        arrays[name] = info
    if data + at != size:
        raise ValueError("it is not complete")
    start, parent, model = int(said["start"]), said["parent"], said["model"]
    has_place = isinstance(parent, str) and isinstance(model, str) and (start > 0 if parent else start == 0)
    if not (len(tokens) and has_place):
        raise ValueError("its place in the text is not clear")
    return Segment(path, model, parent, start, tokens.astype(np.int32), arrays, data, size)


def read_into(segment: Segment, cache: list[Any], count: int) -> None:
    """Append the first tokens of a segment to caches that hold the tokens before it.

    An empty cache is allocated once for what it will hold, its `step`. An error leaves the caches' `offset` as it was.

    Args:
        segment: from `read_segment`.
        cache: one per layer.
        count: number of tokens to append.

    Raises:
        ValueError: the file is damaged, or does not fit the caches.
        OSError: it cannot be read.
    """
    if [name.split(".")[:2] for name in segment.arrays] != _order(cache):
        raise ValueError("it is of another model")
    digest = hashlib.sha256()
    with segment.path.open("rb") as file:
        file.seek(segment.data)
        for i, layer in enumerate(cache):
            for name in ("keys", "values"):
                infos = [info for key, info in segment.arrays.items() if key.split(".")[:2] == [str(i), name]]
                held = getattr(layer, name)
                if held is None:
                    targets = [_allocate(info, max(layer.step, segment.start + count)) for info in infos]
                    setattr(layer, name, tuple(targets) if isinstance(layer, QuantizedKVCache) else targets[0])
                else:
                    targets = list(held) if isinstance(held, (tuple, list)) else [held]
                for target, info in zip(targets, infos, strict=True):
                    _fill(target, info, file, digest, segment.start, count)
    if digest.hexdigest()[:32] != segment.path.stem.rsplit("-", 1)[1]:
        raise ValueError("its content has changed")
    for layer in cache:
        layer.offset = segment.start + count


def _order(cache: list[Any]) -> list[list[str]]:
    """Layer and name of each array that these caches need, in the order in which they are written."""
    parts = [3 if isinstance(layer, QuantizedKVCache) else 1 for layer in cache]
    return [[str(i), name] for i, count in enumerate(parts) for name in ("keys", "values") for _ in range(count)]


def _allocate(info: TensorInfo, room: int) -> mx.array:
    return mx.zeros((*info.shape[:2], room, info.shape[3]), TYPES[info.dtype][0])


def _fill(target: mx.array, info: TensorInfo, file: BinaryIO, digest: Any, start: int, count: int) -> None:
    """Read an array's data from a file into a cache's, in place: MLX has no other reference to it."""
    _, heads, tokens, width = info.shape
    wrong = target.shape[:2] != info.shape[:2] or target.shape[3] != width or NAMES[target.dtype] != info.dtype
    if wrong or target.shape[2] < start + count:
        raise ValueError("its arrays do not fit the text before it")
    kind, _, plain = TYPES[info.dtype]
    row = width * ITEM_SIZES[info.dtype]
    for head, first, last in _steps(heads, tokens, row):
        content = file.read((last - first) * row)
        digest.update(content)
        if len(content) != (last - first) * row:
            raise ValueError("it is not complete")
        if (wanted := min(last, count) - first) > 0:
            block = mx.array(np.frombuffer(content, plain).reshape(-1, width)[:wanted]).view(kind)
            target[:, head : head + 1, start + first : start + first + wanted] = block
            mx.eval(target)
