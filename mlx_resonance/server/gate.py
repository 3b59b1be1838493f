"""What comes before every route: who may ask, how many at once, and a line in the log, without text of a prompt."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal
from .exchange import FIGURES
from .service import busy

logger = logging.getLogger("mlx_resonance.server")
OPEN = ("/health",)  # without a key, however many ask
LONGEST_PATH = 100  # in the log
LOCAL = ("localhost", "::1")


class Gate:
    """Middleware in front of everything.

    Args:
        app: what it guards.
        key: that clients must send as a bearer token; None for all clients.
        host: of a server that only this machine reaches, its name; None if others do. Without a key, requests must
            name such a host: a web page whose name was made to mean this machine does not.
        most: maximum number of requests at once.
    """

    def __init__(self, app: ASGIApp, key: str | None = None, host: str | None = None, most: int = 100) -> None:
        self.app, self.key, self.host, self.most = app, key, host, most
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it before its body is read."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, figures = time.perf_counter(), 499, scope.setdefault(FIGURES, {})
        self._inside += 1

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope["path"], dict(scope["headers"]))
            await self.app(scope, receive, sent)
        except Refusal as refusal:
            await response_of(refusal)(scope, receive, sent)
        except Exception:
            status = 500
            raise
        finally:
            self._inside -= 1
            _log(scope, status, time.perf_counter() - start, figures.get("usage"))

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.key is None:
            self._check_host(headers)
        elif path not in OPEN and not hmac.compare_digest(
            headers.get(b"authorization", b""), b"Bearer " + self.key.encode()
        ):
            message = "the API key is missing or wrong"
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._inside > self.most and path not in OPEN:
            raise busy(f"{self.most} requests are here")

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = _host_of(b"//" + headers.get(b"host", b""))
        if self.host is not None and b"host" in headers:
            if not (host in (*LOCAL, self.host.lower()) or host.startswith("127.")):
                message = (
                    f"the header Host: {host!r:.80} is not a name of this server: ask localhost, or set an API key"
                )
                raise Refusal(421, message)
        if b"origin" in headers and _host_of(headers[b"origin"]) != host:
            raise Refusal(
                403, "a page of another site may ask only with an API key: the header Origin differs from Host"
            )


def _host_of(address: bytes) -> str:
    """The host in an address, without its port; empty if there is none."""
    try:
        return urlsplit(address.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


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
