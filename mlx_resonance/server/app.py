"""The routes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import UsageError
from .body import parse_json
from .errors import Refusal, refusal_of, refusal_of_fields
from .exchange import Exchange
from .gate import LARGEST_BODY, Gate, response_of
from .requests import ChatRequest, CompletionRequest
from .responses import ERRORS, Chat, Health, Model, Models, Text, documented
from .service import DEFAULT_NAME, Service


class StrictRequest(Request):
    """A request whose body is read by `parse_json`."""

    async def json(self) -> Any:
        """The body. Raises Refusal."""
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route of such requests."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's, with them."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            try:
                return await handle(StrictRequest(request.scope, request.receive))
            except HTTPException as error:  # FastAPI's, of an error in `json`
                raise error.__cause__ if isinstance(error.__cause__, Refusal) else error from None

        return handle_strictly


def create_app(service: Service, key: str | None = None, largest_body: int = LARGEST_BODY) -> FastAPI:
    """The server's application.

    Args:
        service: of the model.
        key: that clients must send; None for all clients.
        largest_body: maximum bytes of a request's body.
    """
    app = FastAPI(title="mlx-resonance", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    app.add_middleware(Gate, key=key, largest_body=largest_body)
    for kind in (Refusal, UsageError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _explain)
    threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    model = Model(id=service.name, created=int(time.time()))

    @app.get("/health")
    async def health() -> Health:
        """Whether the server runs."""
        return Health()

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> Models:
        """The model."""
        return Models(data=[model])

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def one_model(name: str) -> Model:
        """The model, by its name."""
        if name not in (service.name, DEFAULT_NAME):
            raise Refusal(404, f"The model '{name}' does not exist", code="model_not_found", param="model")
        return model

    @app.post("/v1/chat/completions", response_model=None, responses=documented(Chat))
    async def chat(asked: ChatRequest) -> Response:
        """The next message of a conversation."""
        return Exchange(service, asked, threads)

    @app.post("/v1/completions", response_model=None, responses=documented(Text))
    async def completions(asked: CompletionRequest) -> Response:
        """What follows a text, or each of several."""
        return Exchange(service, asked, threads)

    return app


async def _explain(request: Request, error: Exception) -> Response:
    """The response to a request that cannot be answered."""
    if isinstance(error, RequestValidationError):
        return response_of(refusal_of_fields(error.errors(), error.body))
    if isinstance(error, HTTPException):
        words = {404: "there is no such path", 405: "the path has no such method"}
        message = words.get(error.status_code, str(error.detail))
        return response_of(Refusal(error.status_code, message, headers=dict(error.headers or {})))
    return response_of(refusal_of(error))
