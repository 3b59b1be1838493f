"""The files of a checkpoint: found on disk or on the hub, and checked before any weight is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
# Bytes of JSON: parsed, it may take thirty times the memory. Headers and indices have 100 or 200 for each tensor.
MAX_HEADER, MAX_INDEX, MAX_CONFIG = 10_000_000, 2**24, 2**20
MAX_OBJECTS = 10**5  # in a header: one for each tensor


class TensorInfo(NamedTuple):
    """A tensor as a file's header describes it: safetensors' name of its type, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def resolve(path_or_hf_repo: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """A local folder as it is; a hub id downloaded, only the files that match.

    Raises:
        FileNotFoundError: neither a folder nor a model that can be downloaded.
        OSError: the connection broke, and did not come back; the next call goes on from there.
    """
    folder = user_path(path_or_hf_repo)
    if folder.is_dir():
        return folder
    name = str(path_or_hf_repo)
    if folder.exists():
        raise FileNotFoundError(f"[load] {name} is a file: expected a folder with config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"[load] {name}: no such folder, and not a hub id (owner/name)")

    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Within it, what the hub answers becomes an error of one line that names the model."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(f"[load] {name}: no such folder, and not a hub id: {_first_line(error)}") from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"[load] {name}: no such folder, and the hub cannot be reached") from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"[load] {name}: no such folder, and the hub says: {_first_line(error)}") from None
    except _http_error() as error:
        raise OSError(f"[load] {name}: the connection broke ({_first_line(error)}): the same command goes on") from None


def user_path(path: str | Path) -> Path:
    """A path with ~ as the home folder. Raises ValueError where there is no such user, or for a name of other bytes."""
    try:
        str(path).encode("utf-8")
        return Path(path).expanduser()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise ValueError(f"[load] {str(path)!r} is no path: {_first_line(error)}") from None


def file_of(folder: Path, name: str) -> Path:
    """A file of a checkpoint's folder, there or not.

    Raises:
        ValueError: it is a link that leads out of the folder; links of the hub's cache lead to its `blobs`.
    """
    path = folder / name
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"[load] {path} is a link out of its folder, to {path.resolve()}: put the file there")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises FileNotFoundError where it is missing, ValueError where it has no `model_type`."""
    path = file_of(folder, "config.json")
    if not path.is_file():
        raise FileNotFoundError(f"[load] {folder} has no config.json")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"[load] {path} has no model_type")
    return config


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object. Raises ValueError where the file holds something else, or more than `limit` bytes."""
    if path.stat().st_size > limit:
        raise ValueError(f"[load] {path} has {path.stat().st_size} bytes: expected at most {limit}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"[load] {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"[load] {path} is not a JSON object")
    return value


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer, chat templates and generation defaults. Raises ValueError for a link out of the folder."""
    patterns = [*TOKENIZER_PATTERNS, "additional_chat_templates/*"]
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    names -= {"config.json", "conversion.json"}  # the latter says how other weights were made
    names = {name for name in names if not name.endswith(".index.json") and (folder / name).is_file()}
    return [file_of(folder, name) for name in sorted(names)]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy `tokenizer_files` to another folder."""
    for file in tokenizer_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def weight_files(folder: Path, pattern: str = WEIGHTS, index: str = INDEX) -> list[Path]:
    """The weight files of a folder: those that its index names, or without one those that match the pattern.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
        ValueError: the index is damaged, or a file is there that it does not name.
    """
    found = {path.name for path in folder.glob(pattern)}
    names = indexed_files(folder, index)
    if names is None:
        if not found:
            raise FileNotFoundError(f"[load] {folder} has no {pattern}")
        names = sorted(found)
    for name in names:
        if not file_of(folder, name).is_file():
            raise FileNotFoundError(f"[load] {folder / name} is missing: {index} names it")
    for stray in sorted(found - set(names)):  # mlx-lm would load it too
        raise ValueError(f"[load] {folder / stray} is not named by {index}: remove one of the two")
    return [folder / name for name in names]


def indexed_files(folder: Path, index: str = INDEX) -> list[str] | None:
    """The names of the weight files that an index has; None without an index. Raises ValueError where it is damaged."""
    path = file_of(folder, index)
    if not path.is_file():
        return None
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"[load] {path} has no weight_map of tensor and file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"[load] {path} names {name!r}: expected a file of the same folder")
    return names


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file. Its header must fit its size: so a truncated download is found before use.

    Returns:
        Each tensor's type, shape and place, in the order of the file.

    Raises:
        ValueError: the header is damaged, or the tensors do not fill the file from end to end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"[load] {path} is not a whole safetensors file: {size} bytes, header of {length}")
        raw = file.read(length)

    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name stands twice")
        if objects > MAX_OBJECTS:
            raise ValueError(f"it has more than {MAX_OBJECTS} objects")
        return result

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_refuse_constant)
        metadata = entries.pop("__metadata__", None) or {}  # MLX writes null
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not of texts")
        tensors = check_header(entries, str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if str(error).startswith("[load]"):
            raise
        raise ValueError(f"[load] {path} has a damaged header: {error!r}") from None
    end = 8 + length + max((info.end for info in tensors.values()), default=0)
    if end != size:
        raise ValueError(f"[load] {path} is truncated: {size} bytes where its header says {end}")
    return tensors


def check_header(entries: Mapping[str, Any], path: str) -> dict[str, TensorInfo]:
    """The entries of a safetensors header, in the order of their bytes.

    Raises:
        ValueError: a type that is unknown, or places that overlap or leave gaps. KeyError or TypeError: no header.
    """
    tensors = {}
    for name, entry in entries.items():
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if dtype not in BYTES:
            raise ValueError(f"[load] {path}: the type {dtype} of {name} is not known; known are {', '.join(BYTES)}")
        if (
            not all(type(number) is int and number >= 0 for number in (start, end, *shape))
            or max(shape, default=0) >= 2**31
        ):
            raise ValueError(f"{name} has no shape and place of whole numbers")
        if end - start != BYTES[dtype] * math.prod(shape):
            raise ValueError(f"{name} has {end - start} bytes, which are no {dtype} of shape {shape}")
        tensors[name] = TensorInfo(dtype, tuple(shape), start, end)
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1][2:]))
    place = 0
    for info in tensors.values():
        if info.start != place:
            raise ValueError("its tensors do not follow each other")
        place = info.end
    return tensors


def parse_size(text: str, name: str) -> int:
    """Bytes of `5GB`, `500MB` …, in powers of ten. Raises ValueError, naming the argument, for anything else."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{name} must be a size such as 500MB or 5GB, got {text!r}")
    return int(float(found[1]) * units[found[2]])


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _http_error() -> type[Exception]:
    """HTTPError of httpx, or of httpx2, whichever huggingface_hub uses: of its own errors the first base."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base
