"""Reading a request's body: within bounds, off the event loop, and as strictly as JSON can be read."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as Mail
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from .errors import Refusal, refusal_of_fields

MIB = 2**20
CHARACTER_BYTES = 16  # of JSON per token of the context: ids have about 8, escaped Chinese up to 12
VALUE_BYTES = 8  # of a body per value: a list of ids as long as the context has room in it
TIME = 30.0  # seconds for a body to come
DEEPEST = 64  # objects and lists within each other
DIGITS = 20  # of an integer: 2**64 has as many
CLOSE = {"Connection": "close"}  # what is left of a body is not read

Kind = TypeVar("Kind", bound=BaseModel)


def largest_body(context: int | None) -> int:
    """Maximum bytes of a body, for a context of that many tokens; None for no limit."""
    return min(max(MIB, CHARACTER_BYTES * (context or MIB)), 64 * MIB)


class Bodies:
    """Reads the bodies of requests.

    Args:
        largest: maximum bytes of one.
    """

    def __init__(self, largest: int) -> None:
        self.largest, self.most = largest, max(64 * MIB, 4 * largest)  # bytes: the latter of all together
        self._held = 0
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parse")

    async def read(self, request: Request, kind: type[Kind]) -> Kind:
        """A request, read and checked.

        Raises:
            Refusal: it is too large, too slow, not JSON, or not a request of this kind.
        """
        if int(request.headers.get("content-length") or 0) > self.largest:
            raise self._too_large()
        if not _is_json(request.headers.get("content-type", "")):
            raise Refusal(400, "expected a JSON object, with the header Content-Type: application/json")
        pieces: list[bytes] = []
        try:
            await asyncio.wait_for(self._receive(request, pieces), TIME)
            loop, most = asyncio.get_running_loop(), self.largest // VALUE_BYTES
            return await loop.run_in_executor(self._parser, _parse, pieces, kind, most)
        except asyncio.TimeoutError:  # in Python 3.10 another class than the built-in one
            raise Refusal(408, f"the body did not come within {TIME:g} s", headers=CLOSE) from None
        finally:
            self._held -= sum(map(len, pieces))

    async def _receive(self, request: Request, pieces: list[bytes]) -> None:
        size, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Refusal(499, "the client hung up")
            piece, more = message.get("body", b""), message.get("more_body", False)
            pieces.append(piece)
            size, self._held = size + len(piece), self._held + len(piece)
            if size > self.largest:
                raise self._too_large(CLOSE)
            if self._held > self.most:
                raise Refusal(503, "too many large requests at once: try again later", headers={"Retry-After": "1"})

    def _too_large(self, headers: dict[str, str] | None = None) -> Refusal:
        message = f"the body has more than {self.largest:,} bytes"
        return Refusal(413, message, code="body_too_large", headers=headers)


def _is_json(content_type: str) -> bool:
    mail = Mail()
    mail["content-type"] = content_type
    kind = mail.get_content_subtype()
    return mail.get_content_maintype() == "application" and (kind == "json" or kind.endswith("+json"))


def _parse(pieces: Sequence[bytes], kind: type[Kind], most: int) -> Kind:
    value = parse_json(b"".join(pieces), most)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise refusal_of_fields(error.errors(include_url=False), value) from None


def parse_json(body: bytes, most: int = MIB // VALUE_BYTES) -> Any:
    """The value in a request's body.

    Args:
        body: of JSON.
        most: maximum number of values in it, each within each other counted.

    Raises:
        Refusal: it is not JSON in UTF-8, has a key twice, a number that is none or too large, text that is not Unicode,
            a null character, too many values, or is nested too deeply.
    """
    if _values(body, most) > most:
        _refuse(f"the body has more than {most:,} values")
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


def _values(body: bytes, most: int) -> int:
    """At least as many as a JSON text has values, which take much more memory than their text."""
    text = body.replace(rb"\\", b"").replace(rb"\"", b"")  # the quotes that are left begin and end strings
    if (strings := text.count(b'"') // 2) > 2 * most:  # keys are strings, too
        return strings
    outside = b"".join(text.split(b'"')[::2])
    return 1 + sum(outside.count(sign) for sign in (b",", b"[", b"{"))


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
