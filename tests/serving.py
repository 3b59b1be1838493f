"""A server in this process, with a real engine or one that writes what a test says."""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_resonance.generation.stream import Response
from mlx_resonance.server.app import create_app
from mlx_resonance.server.service import Service
from mlx_resonance.server.worker import Worker

import uvicorn

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
NAME = "tiny"
COMMAND = [str(Path(sys.executable).with_name("mlx-resonance")), "server"]
PROMPT = "import os\n\n\ndef walk(top):\n"
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set tool_call = call.function %}"
    "<tool_call>{{ tool_call.name }} {{ tool_call.arguments.city }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
)


def with_template(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint with a chat template that has tools."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


def asked(path: str = TEXT, **changes: Any) -> tuple[str, str]:
    body = {"prompt": PROMPT} if path == TEXT else {"messages": [{"role": "user", "content": PROMPT}]}
    return path, json.dumps(body | {"max_tokens": 2} | changes)


@dataclass
class Served:
    """A running server."""

    port: int
    service: Service

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer; `body` is bytes, or an object. Without one it is a GET."""
        status, text = ask(self.port, "GET" if body is None else "POST", path, body, headers)
        return status, json.loads(text)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, which must end as a stream ends."""
        status, text = ask(self.port, "POST", path, body | {"stream": True}, {})
        assert status == 200 and text.endswith(b"\n\n"), text
        lines = [line.removeprefix("data: ") for line in text.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def ask(port: int, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = body if isinstance(body, (bytes, str, type(None))) else json.dumps(body)
        connection.request(method, path, data, JSON | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextmanager
def serving(
    make_engine: Callable[[], Any], key: str | None = None, largest_body: int | None = None, **options: Any
) -> Iterator[Served]:
    """A server; its engine is made on the thread that owns it."""
    made: list[Worker] = []
    ready = threading.Event()

    def work() -> None:
        made.append(Worker(make_engine()))
        ready.set()
        made[0].run()

    owner = threading.Thread(target=work, daemon=True)
    owner.start()
    assert ready.wait(120)
    service = Service(made[0], NAME, **options)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            create_app(service, key, "127.0.0.1", largest_body),
            log_config=None,
            lifespan="off",
            http="h11",
            access_log=False,
        )
        server = uvicorn.Server(config)
        http_thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        http_thread.start()
        try:
            yield Served(listener.getsockname()[1], service)
            assert owner.is_alive() and http_thread.is_alive()
        finally:
            server.should_exit = True
            made[0].stop()
            http_thread.join(60)
            owner.join(60)


class Scripted:
    """An engine that writes given texts, one after another, a few characters at a time.

    Args:
        tokenizer: with a chat template, if there is one.
        texts: the answers. An exception in place of a text is raised after the first token.
        steps: if given, every token waits for one of its releases.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[Any], steps: threading.Semaphore | None = None) -> None:
        self.tokenizer, self.texts, self.steps = tokenizer, iter(texts), steps
        self.vocabulary = 2048
        self.context, self.prompts, self.written, self.closed = 512, list[list[int]](), 0, threading.Event()
        self.lengths: list[int | None] = []

    def check(self, tokens: list[int], max_tokens: int | None = None) -> int:
        return max_tokens or 100

    def clear(self) -> None:
        pass

    def stream(self, tokens: list[int], max_tokens: int | None = None, **options: Any) -> Iterator[Response]:
        self.prompts.append(tokens)
        self.lengths.append(max_tokens)
        return self._stream(tokens, next(self.texts))

    def _stream(self, tokens: list[int], text: Any) -> Iterator[Response]:
        pieces = ["a"] if isinstance(text, Exception) else [text[i : i + 3] for i in range(0, len(text), 3)]
        try:
            for number, piece in enumerate([*pieces, ""], 1):
                if self.steps is not None:
                    self.steps.acquire()
                self.written += 1
                reason = None if number <= len(pieces) else "stop"
                if reason is not None and isinstance(text, Exception):
                    raise text
                yield Response(
                    text=piece, token=5 if reason is None else 1, logprobs=None, from_draft=False,
                    prompt_tokens=len(tokens), prompt_tps=1.0, generation_tokens=number, generation_tps=1.0,
                    peak_memory=0.0, finish_reason=reason,
                )  # fmt: skip
        finally:
            self.closed.set()
