"""What the server says instead of an answer: a status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import DeviceError, UsageError

TYPES = {401: "authentication_error", 500: "server_error", 503: "server_error"}
MOST_CHARACTERS = 500  # of a message


class Refusal(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: one line.
        code: OpenAI's, for programs.
        param: the field of the request that it is about.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        line = " ".join(self.message.split()).encode("utf-8", "replace").decode()
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": line[:MOST_CHARACTERS], "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """What a client hears of an error: its own mistake in words; of ours, only that there was one."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UsageError) and not isinstance(error, DeviceError):
        return Refusal(400, error.message, param=error.option)
    if isinstance(error, DeviceError):
        return Refusal(500, error.message)
    return Refusal(500, "an error in the server: its log has more")


def refusal_of_fields(errors: Sequence[Any], body: Any) -> Refusal:
    """What pydantic found wrong in a request: of several things, the one deepest in it.

    Args:
        errors: pydantic's.
        body: the request, or whatever was sent.
    """
    if not isinstance(body, dict):
        return Refusal(400, "expected a JSON object, with the header Content-Type: application/json")
    places = [_place(error, body) for error in errors]
    place, error = max(zip(places, errors, strict=True), key=lambda found: len(found[0]))
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    param = str(place[0]) if place else None
    if error["type"] == "missing" or (len(place) == 1 and body.get(param) is None):
        return Refusal(400, f"Missing required parameter: '{name}'", code="missing_required_parameter", param=param)
    if error["type"] == "extra_forbidden":
        return Refusal(400, f"Unrecognized request argument supplied: {name}", code="unknown_parameter", param=param)
    return Refusal(400, f"{name}: {error['msg']}", param=param)


def _place(error: Any, body: Any) -> list[Any]:
    """Keys and indices to the faulty value, without the names of types that pydantic puts between them."""
    place: list[Any] = []
    *path, last = error["loc"] or [None]
    for part in path:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            place.append(part)
            body = body[part]
    is_key = isinstance(body, dict) and (last in body or error["type"] == "missing")
    if is_key or (isinstance(body, list) and isinstance(last, int)):
        place.append(last)
    return place
