"""Options that several commands have, and what is read from their text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

Model = Annotated[str, Option(help="Folder or Hugging Face hub id.")]
MlxPath = Annotated[Path, Option("--mlx-path", help="Folder to write; must not exist.")]
ScaledBy = Annotated[float | None, Option(help="How many times the context grows.")]
Original = Annotated[int | None, Option(help="Tokens of context before scaling. Default: as in the source.")]
Dtype = Annotated[str | None, Option(help="float32, float16 or bfloat16. Default: as in the source.")]
Context = Annotated[
    int | None, Option(help="Most tokens of prompt and answer. Default: 16384, or the checkpoint's if fewer.")
]
Factor = Annotated[float | None, Option(help="Stretch the context to so many times the trained one.")]
KvBits = Annotated[int | None, Option(help="Keep keys and values in 4 or 8 bits.")]
PrefillStep = Annotated[int, Option(help="Most prompt tokens in one pass.")]
Memory = Annotated[str | None, Option(help="What there is, such as 16GB. Default: what the device says.")]
Force = Annotated[bool, Option("--force", help="Go on though it does not fit into memory.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


def memory_bytes(memory: str | None) -> int | None:
    """Bytes of --memory; None where it is not given. Raises ValueError where it is no size."""
    from ..files import parse_size

    return None if memory is None else parse_size(memory, "--memory")


def whole_numbers(kind: str, flag: str, text: str) -> list[int]:
    """Different whole numbers with commas between them. Raises ValueError for anything else."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(
            f"[{kind}] {flag} must be whole numbers with commas, such as 1024,2048, got {text!r}"
        ) from None
