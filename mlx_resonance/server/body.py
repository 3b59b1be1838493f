"""Reading JSON strictly: what another reader would take for something else, or none could hold, is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from .errors import Refusal

DEEPEST = 64  # objects and lists within each other
DIGITS = 20  # of an integer: 2**64 has as many


def parse_json(body: bytes) -> Any:
    """The value in a request's body.

    Raises:
        Refusal: it is not JSON in UTF-8, has a key twice, a number that is none or too large, text that is not Unicode,
            a null character, or is nested too deeply.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except UnicodeDecodeError:
        _refuse("the body is not UTF-8 text")
    except json.JSONDecodeError as error:
        _refuse(f"the body is not JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        _refuse(f"the body is nested more than {DEEPEST} levels deep")
    _check(value)
    return value


def _check(value: Any) -> None:
    """Refuse text that cannot be encoded, and deep nesting."""
    found = [(value, 0)]
    while found:
        value, depth = found.pop()
        if isinstance(value, str):
            if "\0" in value:
                _refuse("the body has a null character")
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                _refuse("the body has half of a surrogate pair")
        elif isinstance(value, (dict, list)):
            if depth == DEEPEST:
                _refuse(f"the body is nested more than {DEEPEST} levels deep")
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            found += [(part, depth + 1) for part in parts if isinstance(part, (str, dict, list))]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse("the body has an object with a key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        _refuse("the body has an integer that is too large")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        _refuse("the body has a number that is too large")
    return number


def _constant(name: str) -> NoReturn:
    _refuse(f"the body is not JSON: {name} is not a number")


def _refuse(message: str) -> NoReturn:
    raise Refusal(400, message)
