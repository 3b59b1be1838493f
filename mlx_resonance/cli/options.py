"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import BadParameter, Option

from ..errors import UsageError
from ..files import user_path
from ..sizes import parse_size
from ..storage import check_input

LARGEST = 2**31 - 1
LARGEST_SIZE = "1000TB"
MOST_NUMBERS = 1000  # of a list


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


def integers(low: int, high: int) -> dict[str, Any]:
    """For Typer: integers separated by commas, of which the library refuses those that are not in [low, high]."""

    def parse(text: str) -> list[int]:
        try:
            numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
        except ValueError:
            raise BadParameter(f"expected integers separated by commas, such as 1024,2048, got {text!r}") from None
        if len(numbers) > MOST_NUMBERS:
            raise BadParameter(f"expected at most {MOST_NUMBERS} integers, got {len(numbers)}")
        return numbers

    return {"parser": _parser(parse), "metavar": f"{low}..{high},…"}


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise BadParameter(f"expected names separated by commas, got {text!r}")
    return names


def completed_from(names: Collection[str]) -> Callable[[], list[str]]:
    """For Typer: what a shell may complete a value to."""
    return lambda: list(names)


def _kv_bits(text: str) -> int | tuple[int, ...]:
    bits = tuple(int(part) if part in ("8", "4") else 0 for part in text.split(","))
    if not all(bits) or len(bits) > 2:
        raise BadParameter(f"{text!r} is not one of 8, 4, or two of them: for keys, for values")
    return bits[0] if len(set(bits)) == 1 else bits


def kv_format(kv_bits: Any, kv_rotate: bool) -> Any:
    """The KV format that a command asks for, as its `kv_bits`. Raises UsageError if there is nothing to rotate for."""
    if not kv_rotate:
        return kv_bits
    from ..generation.kv_format import KVFormat

    return KVFormat.of(kv_bits, kv_rotate)


def _prompt_lookup(text: str) -> int | str:
    from ..generation.lookup import check_lookup

    setting: Any = int(text) if text.isdecimal() else text
    check_lookup(setting)
    return setting


def _size(text: str) -> int:
    size = parse_size(text, "it")
    if not 1000 <= size <= parse_size(LARGEST_SIZE, "it"):
        raise BadParameter(f"{text} is not in the range 1KB to {LARGEST_SIZE}")
    return size


def _file(text: str) -> Path:
    path = user_path(text)
    check_input(path, "it")
    return path


def _model(text: str) -> str:
    user_path(text)  # not empty
    return text


path: dict[str, Any] = {"parser": _parser(user_path)}
file: dict[str, Any] = {"parser": _parser(_file)}  # to read
model: dict[str, Any] = {"parser": _parser(_model), "metavar": "MODEL"}
size: dict[str, Any] = {"parser": _parser(_size), "metavar": f"1KB..{LARGEST_SIZE}"}
names: dict[str, Any] = {"parser": _parser(_names), "metavar": "NAME,NAME,…"}


def _text_file(text: str) -> Path:
    return Path("-") if text == "-" else user_path(text)


text_file: dict[str, Any] = {"parser": _parser(_text_file), "metavar": "FILE"}  # or - for standard input

Model = Annotated[str, Option("-m", "--model", **model, help="Folder or Hugging Face hub id.")]
MlxPath = Annotated[Path, Option("--mlx-path", **path, metavar="OUT", help="Folder to write; must not exist.")]
ScaledBy = Annotated[float | None, Option(min=1, max=2**31, help="Factor by which the context grows.")]
Original = Annotated[
    int | None, Option(min=1, max=2**31, help="Tokens of context before scaling. Default: as in the source.")
]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"] | None, Option(help="Default: as in the source.")]
EvalContext = Annotated[
    int | None,
    Option(min=1, max=2**31, help="Maximum tokens of prompt and answer. Default: the checkpoint's, up to 16384."),
]
Context = Annotated[
    int | None,
    Option(min=1, max=2**31, help="Tokens of context. Default: the checkpoint's, or what memory has room for."),
]
Factor = Annotated[
    float | None, Option(min=1, max=2**31, help="Stretch the context to this many times the trained one.")
]


def _methods() -> list[str]:
    from ..positions import METHODS

    return list(METHODS)


Extend = Annotated[
    str | None,
    Option(
        metavar="METHOD", autocompletion=_methods,
        help="Go past the context by other positions: dynamic, self-extend or dca[:WINDOW[:GROUP]].",
    ),
]  # fmt: skip
_bits: dict[str, Any] = {
    "parser": _parser(_kv_bits), "autocompletion": completed_from(("8", "8,4", "4")), "metavar": "8|8,4|4",
}  # fmt: skip
KvBits = Annotated[Any, Option(**_bits, help="Bits of a quantized KV cache: of keys and values, or of each.")]
KvRotate = Annotated[bool, Option("--kv-rotate", help="Rotate each head before it is quantized.")]
_lookup: dict[str, Any] = {"parser": _parser(_prompt_lookup), "autocompletion": completed_from(("auto", "off"))}
PromptLookup = Annotated[
    Any,
    Option(
        **_lookup,
        metavar="auto|off|N",
        help="Check tokens that followed the same words before: as many per pass as pay (auto), none, or N.",
    ),
]
DraftModel = Annotated[
    str | None, Option(**model, help="Model of the same vocabulary whose guesses are checked, several per pass.")
]
Temp = Annotated[float | None, Option(min=0, max=100, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float | None, Option(min=0, max=1, help="Sample from the top tokens of this total probability.")]
TopK = Annotated[int | None, Option(min=0, max=LARGEST, help="Sample from this many top tokens; 0 for all.")]
MinP = Annotated[
    float | None, Option(min=0, max=1, help="Sample from tokens of this probability relative to the top one's.")
]
Penalty = Annotated[
    float | None, Option(min=0, max=100, help="Divide the logits of the last 20 tokens by this; 1 for none.")
]
Seed = Annotated[int | None, Option(min=0, max=2**64 - 1, help="Sampling seed.")]
Stop = Annotated[list[str] | None, Option(metavar="TEXT", help="End the answer before this text; may be repeated.")]
Files = Annotated[
    list[Path] | None,
    Option("-f", "--prompt-file", **text_file, help="Text before the prompt; - for standard input; may be repeated."),
]
SystemPrompt = Annotated[str | None, Option(metavar="TEXT", help="System message for the chat template.")]
LARGEST_CACHE = 10**10  # bytes on disk, unless another size is given
CacheFolder = Annotated[Path | None, Option(**path, metavar="DIR", help="Folder of the on-disk KV cache of prompts.")]
CacheSize = Annotated[int | None, Option(**size, help="Maximum size of the on-disk KV cache. Default: 10GB.")]
NoCache = Annotated[bool, Option("--no-prompt-cache", help="Keep no KV cache on disk.")]
MaxTokens = Annotated[int, Option(min=1, max=LARGEST, help="Maximum number of tokens to generate.")]
PrefillStep = Annotated[int, Option(min=1, max=LARGEST, help="Maximum number of prompt tokens in one pass.")]
Memory = Annotated[int | None, Option(**size, help="Memory budget, e.g. 16GB. Default: the device's limit.")]
Force = Annotated[bool, Option("--force", help="Run even if it does not fit into memory.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]
