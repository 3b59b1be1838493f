"""A checkpoint's files: find them on disk or on the hub, and read their headers before any weight."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from .errors import MissingFileError, UsageError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
CONVERTIBLE = {".bin", ".gguf"}  # what a folder may have instead
# Bytes per number, by safetensors' name for the type.
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
# Maximum bytes of JSON: parsed, it may take thirty times the memory. Indices have 100 or 200 per tensor.
MAX_INDEX, MAX_CONFIG = 2**24, 2**20


class TensorInfo(NamedTuple):
    """A tensor as a file's header describes it: safetensors' name for its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)


def resolve(path_or_hf_repo: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """Return a local folder as it is; for a hub id, download the files that match, and return their folder.

    Raises:
        MissingFileError: it is neither a folder nor a model that can be downloaded.
        OSError: the connection broke; the next call resumes the download.
    """
    if not str(path_or_hf_repo).strip():
        raise MissingFileError("the model's name is empty", option="model")
    folder = user_path(path_or_hf_repo)
    if folder.is_dir():
        return folder
    name = str(path_or_hf_repo)
    if folder.exists():
        hint = ": convert makes one of it" if folder.suffix == ".gguf" else ""
        raise MissingFileError(f"{name} is a file: expected a folder with config.json{hint}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise MissingFileError(f"{name}: no such folder, and not a hub id (owner/name)")

    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the hub's errors into one line that names the model."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise MissingFileError(f"{name}: no such folder, and not a hub id: {_first_line(error)}") from None
    except LocalEntryNotFoundError:
        raise MissingFileError(f"{name}: no such folder, and the hub cannot be reached") from None
    except HfHubHTTPError as error:
        raise MissingFileError(f"{name}: no such folder, and the hub says: {_first_line(error)}") from None
    except _http_error() as error:
        raise OSError(f"{name}: the connection broke ({_first_line(error)}): the same command resumes") from None


def user_path(path: str | Path) -> Path:
    """A path with ~ expanded. Raises UsageError if it is empty, if there is no such user, or if it is not UTF-8."""
    if not str(path).strip():  # Path("") is the current folder
        raise UsageError("the path is empty")
    try:
        str(path).encode("utf-8")
        return Path(path).expanduser()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UsageError(f"{str(path)!r} is not a path: {_first_line(error)}") from None


def file_of(folder: Path, name: str) -> Path:
    """The path of a file in a checkpoint's folder, whether it exists or not.

    Raises:
        UsageError: it is a link out of the folder. Links in the hub's cache may lead to its `blobs`.
    """
    path = folder / name
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise UsageError(f"{path} is a link out of its folder, to {path.resolve()}: put the file itself there")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises MissingFileError if it is missing, UsageError if it has no `model_type`."""
    path = file_of(folder, "config.json")
    if not path.is_file():
        raise MissingFileError(f"{folder} has no config.json{_instead(folder)}")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{path} has no model_type")
    return config


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError if the file holds something else, or more than `limit` bytes."""
    if path.stat().st_size > limit:
        raise UsageError(f"{path} has {path.stat().st_size} bytes: expected at most {limit}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object")
    return value


def weight_files(folder: Path, pattern: str = WEIGHTS, index: str = INDEX) -> list[Path]:
    """The weight files of a folder: those that its index names or, without an index, those that match the pattern.

    Raises:
        MissingFileError: there are none, or one that the index names is missing.
        UsageError: the index is damaged, or does not name a weight file in the folder.
    """
    found = {path.name for path in folder.glob(pattern)}
    names = indexed_files(folder, index)
    if names is None:
        if not found:
            raise MissingFileError(f"{folder} has no {pattern}{_instead(folder)}")
        names = sorted(found)
    for name in names:
        if not file_of(folder, name).is_file():
            raise MissingFileError(f"{folder / name} is missing: {index} names it")
    for stray in sorted(found - set(names)):  # mlx-lm would load it too
        raise UsageError(f"{folder / stray} is not named by {index}: remove one of the two")
    return [folder / name for name in names]


def _instead(folder: Path) -> str:
    """Which files of other formats a folder has, in words."""
    others = {path.suffix for path in folder.glob("*") if path.suffix in CONVERTIBLE}
    return f" but {' and '.join(sorted(others))} files: convert reads them" if others else ""


def indexed_files(folder: Path, index: str = INDEX) -> list[str] | None:
    """The weight files that an index names; None if there is no index. Raises UsageError if it is damaged."""
    path = file_of(folder, index)
    if not path.is_file():
        return None
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{path} has no weight_map of tensor and file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise UsageError(f"{path} names {name!r}: expected a file in the same folder")
    return names


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        UsageError: the header is damaged or does not fit the size of the file, e.g. after a broken download.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            tensors = {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices}
    except (SafetensorError, OSError) as error:  # an empty file cannot be mapped
        reason = _first_line(error).removeprefix("Error while deserializing header: ")
        raise UsageError(f"{path} is not a complete safetensors file, copy it again: {reason}") from None
    check_types(tensors, str(path))
    return tensors


def read_layout(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file as it is written, without its metadata: type, shape and offsets by name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    start = 8 + size
    return {
        name: entry | {"data_offsets": [start + offset for offset in entry["data_offsets"]]}
        for name, entry in header.items()
        if name != "__metadata__"
    }


def same_data(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    """Whether two tensors, each in a safetensors file, have the same type, shape and bytes. Reads a block at a time."""
    entries = [read_layout(path)[name] for path, name in (one, other)]
    if any(entries[0][key] != entries[1][key] for key in ("dtype", "shape")):
        return False
    with one[0].open("rb") as first, other[0].open("rb") as second:
        for file, entry in ((first, entries[0]), (second, entries[1])):
            file.seek(entry["data_offsets"][0])
        left = entries[0]["data_offsets"][1] - entries[0]["data_offsets"][0]
        while left > 0:
            size = min(left, 2**22)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def check_types(tensors: Mapping[str, TensorInfo], path: str) -> None:
    """Raise UsageError if a tensor has a type that MLX lacks, or an axis longer than MLX can index."""
    for name, info in tensors.items():
        if info.dtype not in ITEM_SIZES:
            raise UsageError(f"{path}: {name} has the unknown type {info.dtype}; known: {', '.join(ITEM_SIZES)}")
        if max(info.shape, default=0) >= 2**31:
            raise UsageError(f"{path}: {name} has shape {info.shape}: no axis may have 2**31 entries or more")


def merge_headers(headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Merge the tensors of several files. Raises UsageError if two files hold the same one."""
    place: dict[str, str] = {}
    for file, tensors in headers.items():
        for name in tensors:
            if name in place:
                raise UsageError(f"{name} is in {place[name]} and in {file}: it must be in only one of them")
            place[name] = file
    return {name: info for tensors in headers.values() for name, info in tensors.items()}


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _http_error() -> type[Exception]:
    """HTTPError from httpx or httpx2, whichever huggingface_hub uses: the first base of its own errors."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base
