"""A checkpoint's tokenizer: which files it consists of, and how to load it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MissingFileError, UsageError
from .files import file_of, read_json

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
DECISIVE = {
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "generation_config.json", "chat_template.json",
}  # fmt: skip
TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer, chat templates and generation defaults. Raises UsageError for a link out of the folder."""
    patterns = [*TOKENIZER_PATTERNS, "additional_chat_templates/*"]
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    names -= {"config.json", "conversion.json"}  # the latter records how other weights were made
    names = {name for name in names if not name.endswith(".index.json") and (folder / name).is_file()}
    return [file_of(folder, name) for name in sorted(names)]


def decisive_files(folder: Path) -> list[Path]:
    """Those of `tokenizer_files` that decide token ids and prompts: a note in the folder is not one of them."""
    return [path for path in tokenizer_files(folder) if path.suffix == ".jinja" or path.name in DECISIVE]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy `tokenizer_files` to another folder."""
    for file in tokenizer_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def load_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerWrapper:
    """Load the tokenizer of a folder, in mlx-lm's wrapper. Raises MissingFileError if there is none."""
    import mlx_lm.utils

    if not has_tokenizer(folder):
        raise MissingFileError(f"{folder} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    # transformers reads config.json too, and would warn about a rope type that it does not know and never uses.
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    eos = generation.get("eos_token_id") or config.get("eos_token_id")
    try:
        no_code = {"trust_remote_code": False}  # transformers would ask whether to run it
        return mlx_lm.utils.load_tokenizer(folder, no_code, eos_token_ids=eos)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"the tokenizer of {folder} cannot be loaded: {error}") from None
