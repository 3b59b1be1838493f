"""The texts of a prompt: from flags, files and standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..errors import MissingFileError, UsageError

LARGEST_PROMPT = 2**28  # bytes
STDIN = Path("-")


def read_texts(prompt: str | None, files: Sequence[Path]) -> tuple[list[str], str | None]:
    """The documents and the question of a prompt; without either, standard input is the only document.

    Args:
        prompt: the question; None if there is none.
        files: the documents' paths; `-` for standard input.

    Raises:
        UsageError: there is no prompt, standard input is named twice, or a text is empty, too large or not UTF-8.
        MissingFileError: there is no such file.
    """
    if files.count(STDIN) > 1:
        raise UsageError("standard input can be read once", option="prompt_file")
    if prompt is None and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt was given", remedies=[{"prompt": None}, {"prompt_file": None}])
        files = [STDIN]
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", option="prompt")
    return [read_text(path) for path in files], prompt


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        UsageError: it is empty, too large or not UTF-8.
        MissingFileError: there is no such file.
    """
    name = "standard input" if path == STDIN else str(path)
    if path == STDIN and sys.stdin is None:
        raise UsageError("standard input is closed", option="prompt_file")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: a file is needed", option="prompt_file")
    if path != STDIN and not path.exists():
        raise MissingFileError(f"{path}: no such file", option="prompt_file")
    # A device or a pipe may never end; the locale may have another encoding.
    with nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb") as source:
        content = source.read(LARGEST_PROMPT + 1)
    if len(content) > LARGEST_PROMPT:
        raise UsageError(f"{name} has more than {LARGEST_PROMPT} bytes", option="prompt_file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: {error}", option="prompt_file") from None
    if not text.strip():
        raise UsageError(f"the prompt is empty: {name} has no text", option="prompt_file")
    return text
