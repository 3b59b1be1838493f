"""What comes before every route: the API key, a limit for bodies, and a line in the log, without text of a prompt."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal
from .exchange import FIGURES

logger = logging.getLogger("mlx_resonance.server")
LARGEST_BODY = 16 * 2**20  # bytes; a million tokens of text are about 5 MB
OPEN = ("/health",)  # without a key
LONGEST_PATH = 100  # in the log


class Gate:
    """Middleware in front of everything.

    Args:
        app: what it guards.
        key: that clients must send as a bearer token; None for all clients.
        largest_body: maximum bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, key: str | None = None, largest_body: int = LARGEST_BODY) -> None:
        self.app, self.key, self.largest_body = app, key, largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it before its body is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, figures = time.perf_counter(), 499, scope.setdefault(FIGURES, {})

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            self._check_size(int(headers.get(b"content-length", b"0") or 0))
            await self.app(scope, self._limited(receive), sent)
        except Refusal as refusal:
            await response_of(refusal)(scope, receive, sent)
        except Exception:
            status = 500
            raise
        finally:
            _log(scope, status, time.perf_counter() - start, figures.get("usage"))

    def _check_key(self, path: str, given: bytes) -> None:
        if self.key is None or path in OPEN:
            return
        if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
            message = "the API key is missing or wrong"
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_size(self, size: int) -> None:
        if size > self.largest_body:
            raise Refusal(413, f"the body has more than {self.largest_body:,} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not say how long they are."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            self._check_size(read)
            return message

        return limited


def response_of(refusal: Refusal) -> JSONResponse:
    """The response that carries a refusal."""
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _log(scope: Scope, status: int, seconds: float, usage: Any) -> None:
    path = scope.get("raw_path", b"").decode("ascii", "replace")[:LONGEST_PATH]
    client: Sequence[Any] = scope.get("client") or ("-",)
    tokens = ""
    if usage is not None:
        cached = usage.prompt_tokens_details.cached_tokens
        tokens = f", prompt {usage.prompt_tokens:,} tokens ({cached:,} cached), generated {usage.completion_tokens:,}"
    logger.info(f"{client[0]} {scope['method']} {path} {status}, {seconds:.2f} s{tokens}")
