"""A request's way from its acceptance to the last byte of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from .answers import Answer, ChatAnswer, TextAnswer
from .errors import refusal_of
from .requests import Asked, ChatRequest
from .responses import sparse
from .service import Service, offered_tools
from .worker import Work

PATIENCE = 10.0  # seconds after which a stream without news gets a comment, so that nobody takes it for dead
SENDING = 60.0  # seconds that a client may take none of its answer
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
FIGURES = "mlx_resonance.figures"  # in the scope of a request: for the log


class Exchange(Response):
    """The response to a request: it waits in the queue, then sends what the engine writes.

    A client that hangs up ends it: at once in the queue, within a token in the engine. So does one that takes nothing.

    Args:
        service: of the model.
        asked: the request.
        threads: where prompts are tokenized, in the order in which they come.
    """

    def __init__(self, service: Service, asked: Asked, threads: Executor) -> None:
        super().__init__()
        self.service, self.asked, self.threads = service, asked, threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises Refusal or UsageError before anything is sent, if there is no answer."""
        with self.service.place():
            loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
            gone = asyncio.create_task(_hang_up(receive))

            def tell(event: Any) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(events.put_nowait, event)

            async def send_in_time(message: Message) -> None:
                await asyncio.wait_for(send(message), SENDING)

            try:
                work = await loop.run_in_executor(self.threads, self._submit, gone, tell)
                if work is not None:
                    gone.add_done_callback(lambda _: self.service.worker.withdraw(work))
                    await self._answer(work, events, scope, send_in_time)
            except asyncio.TimeoutError:  # uvicorn closes the connection, since the response is not complete
                pass
            finally:
                gone.cancel()  # withdraws it, too

    def _submit(self, gone: asyncio.Task[None], tell: Callable[[Any], None]) -> Work | None:
        """On another thread, since tokenizing takes seconds for a long prompt."""
        if gone.done():
            return None
        work = self.service.prepare(self.asked, tell)
        self.service.worker.submit(work)
        return work

    async def _answer(self, work: Work, events: asyncio.Queue[Any], scope: Scope, send: Send) -> None:
        answer, left = self._empty_answer(work), len(work.prompts)
        stream = Stream(send) if self.asked.stream else None
        if stream is not None:
            await stream.begin(answer.begin())
        failure: Exception | None = None
        while (event := await _next(events, stream)) is not None:
            if isinstance(event, Exception):
                failure = event
            elif not work.cancelled:
                found = list(answer.add(event))
                left -= event.finish_reason is not None
                if stream is not None:
                    await stream.send(found)
                if not left:  # the engine may still have to write its cache to disk
                    await self._finish(answer, stream, scope, send)
        if failure is not None and left and stream is not None:
            await stream.fail(failure)
        elif failure is not None and left:
            raise refusal_of(failure)

    def _empty_answer(self, work: Work) -> Answer:
        asked, name = self.asked, self.service.name
        if not isinstance(asked, ChatRequest):
            return TextAnswer(name, len(work.prompts), work.alternatives)
        tokenizer, sections = self.service.worker.engine.tokenizer, self.service.sections(asked, work)
        one_call = asked.parallel_tool_calls is False
        return ChatAnswer(name, tokenizer, sections, offered_tools(asked), work.alternatives is not None, one_call)

    async def _finish(self, answer: Answer, stream: Stream | None, scope: Scope, send: Send) -> None:
        scope.setdefault(FIGURES, {})["usage"] = answer.usage
        if stream is None:
            await JSONResponse(sparse(answer.whole()))(scope, _nothing, send)
            return
        options = self.asked.stream_options
        await stream.end([answer.end()] if options is not None and options.include_usage else [])


class Stream:
    """Server-sent events.

    Args:
        send: of ASGI.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    async def begin(self, answers: Iterable[BaseModel]) -> None:
        """The headers and the first events."""
        await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self.send(answers)

    async def send(self, answers: Iterable[BaseModel]) -> None:
        """Some events."""
        if events := "".join(_event(sparse(answer)) for answer in answers):
            await self._write(events)

    async def comment(self) -> None:
        """What clients ignore."""
        await self._write(": waiting\n\n")

    async def end(self, answers: Iterable[BaseModel]) -> None:
        """The last events."""
        await self._write("".join(_event(sparse(answer)) for answer in answers) + "data: [DONE]\n\n", more=False)

    async def fail(self, error: Exception) -> None:
        """An error instead of further events."""
        await self._write(_event(refusal_of(error).body()), more=False)

    async def _write(self, text: str, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


async def _next(events: asyncio.Queue[Any], stream: Stream | None) -> Any:
    while True:
        try:
            return await asyncio.wait_for(events.get(), PATIENCE if stream is not None else None)
        except asyncio.TimeoutError:  # in Python 3.10 another class than the built-in one
            assert stream is not None
            await stream.comment()


async def _hang_up(receive: Receive) -> None:
    """Wait for the end of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> dict[str, Any]:
    raise RuntimeError("nothing more to receive")
