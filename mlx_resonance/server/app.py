"""The routes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import UsageError
from .body import Bodies, largest_body
from .errors import Refusal, refusal_of
from .exchange import Exchange
from .gate import Gate, response_of
from .requests import ChatRequest, CompletionRequest
from .responses import ERRORS, Chat, Health, Model, Models, Text, documented
from .service import Service

OTHERS = 64  # requests at once that are not in the queue: bodies on their way, questions for the model's name


class BodyRoute(APIRoute):
    """A route whose request is read by `Bodies`: FastAPI would parse it on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's, for those that have no request in their arguments."""
        kind = get_type_hints(self.endpoint).get("asked")
        if kind is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            response: Response = await self.endpoint(await request.app.state.bodies.read(request, kind))
            return response

        return handle


def create_app(
    service: Service, key: str | None = None, host: str | None = None, largest: int | None = None
) -> FastAPI:
    """The server's application.

    Args:
        service: of the model.
        key, host: as of `Gate`.
        largest: maximum bytes of a request's body; None for what the context has room for.
    """
    app = FastAPI(title="mlx-resonance", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.route_class = BodyRoute
    app.state.bodies = Bodies(largest or largest_body(service.worker.engine.context))
    app.add_middleware(Gate, key=key, host=host, most=service.queue + OTHERS)
    for kind in (Refusal, UsageError, HTTPException, Exception):
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
        service.check_name(name)
        return model

    app.head("/health", include_in_schema=False)(health)  # load balancers ask so

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
    if isinstance(error, HTTPException):
        words = {404: "there is no such path", 405: "the path has no such method"}
        message = words.get(error.status_code, str(error.detail))
        return response_of(Refusal(error.status_code, message, headers=dict(error.headers or {})))
    return response_of(refusal_of(error))
