"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import BadParameter, Option

from ..errors import UsageError
from ..files import user_path
from ..sizes import parse_size

LARGEST = 2**31 - 1


def _parser(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A parser for Typer: a wrong value becomes Typer's own error, which names the flag."""

    def parsed(text: Any) -> Any:
        if not isinstance(text, str):  # a default
            return text
        try:
            return parse(text)
        except UsageError as error:
            raise BadParameter(error.message) from None

    return parsed


def _integers(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise BadParameter(f"expected integers separated by commas, such as 1024,2048, got {text!r}") from None


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise BadParameter(f"expected names separated by commas, got {text!r}")
    return names


def _kv_bits(text: str) -> int:
    if text not in ("8", "4"):
        raise BadParameter(f"{text!r} is not one of 8, 4")
    return int(text)


def _path(text: str) -> Path:
    if not text.strip():
        raise BadParameter("the path is empty")
    return user_path(text)


path: dict[str, Any] = {"parser": _parser(_path)}
size: dict[str, Any] = {"parser": _parser(lambda text: parse_size(text, "it")), "metavar": "SIZE"}
integers: dict[str, Any] = {"parser": _parser(_integers), "metavar": "N,N,…"}
names: dict[str, Any] = {"parser": _parser(_names), "metavar": "NAME,NAME,…"}

Model = Annotated[str, Option("-m", "--model", help="Folder or Hugging Face hub id.")]
MlxPath = Annotated[Path, Option("--mlx-path", **path, metavar="OUT", help="Folder to write; must not exist.")]
ScaledBy = Annotated[float | None, Option(min=1, max=2**31, help="Factor by which the context grows.")]
Original = Annotated[
    int | None, Option(min=1, max=2**31, help="Tokens of context before scaling. Default: as in the source.")
]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"] | None, Option(help="Default: as in the source.")]
Context = Annotated[
    int | None,
    Option(min=1, max=2**31, help="Maximum tokens of prompt and answer. Default: the checkpoint's, up to 16384."),
]
Factor = Annotated[
    float | None, Option(min=1, max=2**31, help="Stretch the context to this many times the trained one.")
]
KvBits = Annotated[int | None, Option(parser=_parser(_kv_bits), metavar="8|4", help="Bits of a quantized KV cache.")]
MaxTokens = Annotated[int, Option(min=1, max=LARGEST, help="Maximum number of tokens to generate.")]
PrefillStep = Annotated[int, Option(min=1, max=LARGEST, help="Maximum number of prompt tokens in one pass.")]
Memory = Annotated[int | None, Option(**size, help="Memory budget, e.g. 16GB. Default: the device's limit.")]
Force = Annotated[bool, Option("--force", help="Run even if it does not fit into memory.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]
