"""The rope types of config.json, the keys that each takes, and the kinds of values that a key may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeGuard

from .errors import UsageError
from .frequencies import (
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)

PREFIX = "resonance_"
DEFAULT_BASE = 10000.0  # transformers' default for `rope_theta`; LLaMA 1 and 2 leave the key out
ORIGINAL = "original_max_position_embeddings"

# A type's keys in config.json are its maker's keyword names: to add a type, add its maker here.
MAKERS: Mapping[str, Callable[..., RotaryFrequencies]] = MappingProxyType(
    {
        "default": default_frequencies,
        "linear": linear_frequencies,
        "ntk": ntk_frequencies,
        "dynamic": dynamic_ntk_frequencies,
        "yarn": yarn_frequencies,
        "llama3": llama3_frequencies,
        "longrope": longrope_frequencies,
    }
)
# Names that others have given to a type, and what to do about them.
OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "su": "it is called longrope now",
        "dynamic_ntk": "it is called dynamic here",
        "ntk_dynamic": "it is called dynamic here",
        "dynamic_yarn": "its factor grows with the text; convert the checkpoint with the scaling yarn",
        "yarn_dynamic": "its factor grows with the text; convert the checkpoint with the scaling yarn",
    }
)
NOT_IN_ROPE_DICT = {"dims", "base", "seq_len", "max_position_embeddings"}  # these are elsewhere in config.json
LONGEST = 2**31  # tokens
WIDEST = 2**16  # features of a head
LARGEST = 1e15  # for any number in config.json; JSON may hold NaN, infinities and 10**400
LISTS, INTEGERS, BOOLEANS = ({"short_factor", "long_factor"}, {ORIGINAL}, {"truncate"})


def type_keys(base_type: str) -> tuple[list[str], set[str]]:
    """The keys that a type takes in its dictionary, and those of them that it cannot do without."""
    arguments = inspect.signature(MAKERS[base_type]).parameters
    keys = [key for key in arguments if key not in NOT_IN_ROPE_DICT]
    return keys, {key for key in keys if arguments[key].default is inspect.Parameter.empty}


def check_type(rope_type: Any) -> None:
    """Raise UsageError if the type is unknown; under another name, say what it is called here."""
    base_type = rope_type.removeprefix(PREFIX) if isinstance(rope_type, str) else None
    if base_type in MAKERS:
        return
    hint = OTHER_NAMES.get(str(base_type).replace("-", "_"))
    known = f"known: {', '.join(MAKERS)}, each also as {PREFIX}…"
    raise UsageError(f"[RopeConfig] unknown rope_type {rope_type!r:.80}; {hint or known}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number of a size that config.json may have; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def check_kind(key: str, value: Any, kind: type | tuple[type, ...] | None = None) -> None:
    """Raise UsageError if the value is of the wrong kind for its key."""
    if kind is None:
        kind = list if key in LISTS else bool if key in BOOLEANS else int if key in INTEGERS else (int, float)
    wanted = {list: "a list of numbers", bool: "true or false", int: "an integer"}.get(kind, "a number")  # type: ignore[arg-type]
    right = isinstance(value, kind)
    if right and kind is not bool:
        right = all(is_number(number) for number in (value if kind is list else [value]))
    if not right:
        raise UsageError(f"[RopeConfig] {key} must be {wanted}, got {value!r:.80}")
