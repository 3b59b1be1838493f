"""The header of a GGUF file: its metadata and where its tensors are, read within bounds of time and memory.

Format: ggml-org/ggml, docs/gguf.md. The gguf package's own reader believes the lengths that it finds.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_resonance.errors import UsageError

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC, VERSIONS = b"GGUF", (2, 3)
# A vocabulary of 262 144 tokens takes 20 MB and a million entries; a model of 405 billion parameters has 1138 tensors.
MAX_HEADER, MAX_KEYS, MAX_TENSORS, MAX_ENTRIES = 2**27, 2**14, 2**16, 2**22
ALIGNMENT = 32  # unless the metadata says otherwise
BOOL, STRING, ARRAY = 7, 8, 9
# The formats of the other types of values, for struct and NumPy.
FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is in its file.

    Args:
        kind: its type.
        shape: the last axis is that of the blocks.
        offset, nbytes: of its data in the file.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data.

    Args:
        metadata: plain values by key. A float32 is the shortest decimal that stands for it.
        tensors: by name, in their order.
        digest: the SHA-256, shortened, of the header's bytes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    digest: str


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a header.

    Raises:
        UsageError: the file is not GGUF, damaged, truncated, or larger in some respect than any model.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    with path.open("rb") as file:
        reader = _Reader(path, file)
        _check_version(reader)
        tensor_count, key_count = reader.number("<Q", "tensor count"), reader.number("<Q", "key count")
        for count, limit, what in ((tensor_count, MAX_TENSORS, "tensors"), (key_count, MAX_KEYS, "metadata keys")):
            if count > limit:
                raise reader.error(f"has {count} {what}: expected at most {limit}")
        metadata: dict[str, Any] = {}
        for i in range(key_count):
            key = reader.text(f"metadata key {i}")
            if key in metadata:
                raise reader.error(f"has {key!r:.80} twice")
            metadata[key] = reader.value(reader.number("<I", f"the type of {key!r:.80}"), key)
        entries: dict[str, GgufTensor] = {}
        for i in range(tensor_count):
            name = reader.text(f"the name of tensor {i}")
            if name in entries:
                raise reader.error(f"has tensor {name!r:.80} twice")
            entries[name] = _tensor(reader, name)
        start = _aligned(reader, metadata)
        tensors = _placed(reader, entries, start, metadata.get("general.alignment", ALIGNMENT))
        file.seek(0)
        digest = hashlib.sha256(file.read(reader.position)).hexdigest()[:16]
    return GgufHeader(metadata, tensors, digest)


class _Reader:
    """Reads the header from its beginning; every length is checked before anything of that length is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.position = self.entries = 0

    def error(self, what: str) -> UsageError:
        return UsageError(f"{self.path} {what}")

    def take(self, count: int, what: str) -> bytes:
        end = self.position + count
        if end > self.size:
            raise self.error(f"is truncated or damaged: it ends at byte {self.size}, within {what}")
        if end > MAX_HEADER:
            raise self.error(f"has a header of more than {MAX_HEADER} bytes, at {what}")
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f"changed while {what} was read")
        self.position = end
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("<Q", f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"has bytes that are not UTF-8 in {what}: {data!r:.60}") from None

    def value(self, kind: int, key: str) -> Any:
        what = f"the value of {key!r:.80}"
        if kind == ARRAY:
            return self.array(key, what)
        if kind == STRING:
            return self.text(what)
        if kind == BOOL:
            return self.flags(self.take(1, what), what)[0]
        if kind not in FORMATS:
            raise self.error(f"has {key!r:.80} of type {kind}, which GGUF does not have")
        value = self.number(FORMATS[kind], what)
        return float(str(np.float32(value))) if FORMATS[kind] == "<f" else value

    def array(self, key: str, what: str) -> list[Any]:
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind == ARRAY:
            raise self.error(f"has {key!r:.80}, an array of arrays: expected one of numbers or strings")
        if kind not in FORMATS and kind not in (BOOL, STRING):
            raise self.error(f"has {key!r:.80}, an array of type {kind}, which GGUF does not have")
        self.entries += count
        if self.entries > MAX_ENTRIES:
            raise self.error(f"has {key!r:.80} with {count} entries: expected at most {MAX_ENTRIES} in all arrays")
        if kind == STRING:
            return [self.text(f"{key!r:.80}[{i}]") for i in range(count)]
        if kind == BOOL:
            return self.flags(self.take(count, what), what)
        data = self.take(count * struct.calcsize(FORMATS[kind]), what)
        values: list[Any] = np.frombuffer(data, FORMATS[kind]).tolist()
        return values

    def flags(self, data: bytes, what: str) -> list[bool]:
        if wrong := set(data) - {0, 1}:
            raise self.error(f"has {min(wrong)} in {what}: expected 0 or 1")
        return [byte == 1 for byte in data]


def _check_version(reader: _Reader) -> None:
    if reader.size == 0:
        raise reader.error("is empty")
    magic = reader.take(4, "the first 4 bytes")
    if magic != MAGIC:
        raise reader.error(f"is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    version = reader.number("<I", "the version")
    if version in VERSIONS:
        return
    if version & 0xFFFF == 0 and version != 0:
        raise reader.error("is big-endian: only little-endian files are read")
    raise reader.error(f"has GGUF version {version}: versions 2 and 3 are read")


def _tensor(reader: _Reader, name: str) -> GgufTensor:
    """A tensor's entry; its offset still counts from the beginning of the data."""
    what = f"the entry of tensor {name!r:.80}"
    axes = reader.number("<I", what)
    if not 1 <= axes <= 4:
        raise reader.error(f"has tensor {name!r:.80} with {axes} axes: expected 1 to 4")
    shape = tuple(reader.number("<Q", what) for _ in range(axes))[::-1]  # GGUF begins with the innermost axis
    number, offset = reader.number("<I", what), reader.number("<Q", what)
    if not all(1 <= length < 2**31 for length in shape):
        raise reader.error(f"has tensor {name!r:.80} of shape {shape}: every axis must have 1 to 2**31 - 1 entries")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise reader.error(f"has tensor {name!r:.80} of type {number}, which is not known") from None
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise reader.error(f"has tensor {name!r:.80} with rows of {shape[-1]}: {kind.name} has blocks of {block}")
    blocks = shape[-1] // block
    for length in shape[:-1]:
        blocks *= length
    return GgufTensor(kind, shape, offset, blocks * size)


def _aligned(reader: _Reader, metadata: dict[str, Any]) -> int:
    """Where the data begins."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    right = type(alignment) is int and 0 < alignment <= 2**20 and alignment & (alignment - 1) == 0
    if not right:
        raise reader.error(f"has general.alignment = {alignment!r:.80}: expected a power of two")
    return -(-reader.position // alignment) * alignment


def _placed(reader: _Reader, entries: dict[str, GgufTensor], start: int, alignment: int) -> dict[str, GgufTensor]:
    """The tensors with offsets in the file, all checked: aligned, within the file, none within another."""
    end, before = start, ""
    for name, tensor in sorted(entries.items(), key=lambda entry: entry[1].offset):
        first = start + tensor.offset
        last = first + tensor.nbytes
        if tensor.offset % alignment:
            raise reader.error(f"has tensor {name!r:.80} at {tensor.offset}, not a multiple of {alignment}")
        if last > reader.size:
            raise reader.error(
                f"is truncated or damaged: tensor {name!r:.80} ends at byte {last}, the file at {reader.size}"
            )
        if first < end:
            raise reader.error(f"has tensor {name!r:.80} within the data of {before!r:.80}")
        end, before = last, name
    return {
        name: GgufTensor(tensor.kind, tensor.shape, start + tensor.offset, tensor.nbytes)
        for name, tensor in entries.items()
    }
