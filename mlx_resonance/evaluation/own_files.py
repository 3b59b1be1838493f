"""What our own lm-eval tasks take from its metadata: lengths, a tokenizer, the user's copies of files."""

# lm-eval's packages have no types, and are an extra:
# mypy: disable-error-code="import-untyped,import-not-found"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import MissingFileError, UsageError
from ..files import user_path
from ..run_log import Record

LENGTHS, TOKENIZER = "max_seq_lengths", "tokenizer"  # lm-eval's names


@lru_cache(maxsize=1)
def load_tokenizer(name: str) -> Any:
    """transformers' tokenizer, which runs no code of its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def tokenizer_of(metadata: Mapping[str, Any]) -> str:
    """The folder of the tokenizer. Raises UsageError where its code would have to run."""
    if TOKENIZER not in metadata:
        raise UsageError("the tokenizer comes with code (auto_map)", remedies=[{"trust_remote_code": True}])
    return str(metadata[TOKENIZER])


def lengths_of(metadata: Mapping[str, Any], task: str) -> list[int]:
    """The lengths to ask at, in rising order. Raises UsageError where there are none."""
    if not metadata.get(LENGTHS):
        raise UsageError(f"{task} is asked at given lengths", remedies=[{"lengths": None}])
    return sorted(metadata[LENGTHS])


def path_in(metadata: Mapping[str, Any], key: str, folder: bool = False) -> Path:
    """A file or folder that metadata name. Raises UsageError where they do not, or there is none."""
    if not isinstance(metadata.get(key), str):
        raise UsageError(f'{{"{key}": "PATH"}} is missing in the metadata', option="metadata")
    path = user_path(metadata[key])
    if not (path.is_dir() if folder else path.is_file()):
        raise MissingFileError(f"{path}: no such {'folder' if folder else 'file'}", option="metadata")
    return path


def test_split(documents: Sequence[Record], task: str, lengths: Sequence[int]) -> dict[str, Any]:
    """lm-eval's data set of some documents. Raises UsageError where there are none."""
    import datasets

    if not documents:
        raise UsageError(f"{task} has no document of {' or '.join(map(str, lengths))} tokens", option="lengths")
    return {"test": datasets.Dataset.from_list(list(documents))}
