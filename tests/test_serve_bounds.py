"""What no client can do to the server: fill its memory, hold its queue, or keep others waiting."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.cli.serve import ENDS, is_loopback, listen, public_name, signalled
from mlx_resonance.generation import Engine
from mlx_resonance.server import body, exchange
from mlx_resonance.server.body import largest_body, parse_json
from mlx_resonance.server.errors import Refusal
from mlx_resonance.server.worker import Work, Worker

import pytest

from .serving import CHAT, TEXT, Scripted, asked, serving
from .test_serve_load import HEAD, receive, wait_for

CHUNKED = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()


def test_a_large_body(tokenizer: Any) -> None:
    with serving(lambda: Scripted(tokenizer, ["x"]), largest_body=1000) as served:
        status, answer = served.ask(*asked(prompt="x" * 1000))
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            connection.sendall(CHUNKED + b"3e9\r\n" + b"x" * 1001 + b"\r\n")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 413 and answer.getheader("connection") == "close" and answer.read()
            assert connection.recv(1) == b""  # although the body has no end yet
        assert served.ask(*asked())[0] == 200


def test_bounds_follow_the_context() -> None:
    sizes = [largest_body(context) for context in (512, 131_072, 2**20, 10**8, None)]
    assert sizes == [2**20, 2 * 2**20, 16 * 2**20, 64 * 2**20, 16 * 2**20]
    for context in (512, 131_072):  # a prompt of ids that fills the context
        size = largest_body(context)
        ids = json.dumps({"prompt": [128_000] * context}).encode()
        assert len(ids) < size and parse_json(ids, size // body.VALUE_BYTES)


@pytest.mark.parametrize(
    "text", ["[%s1]" % ("1," * 1000), "[%s1]" % ("{}," * 1000), "[%s1]" % ('"",' * 2001), "[[" + "[]," * 999 + "1]]"]
)
def test_a_body_of_too_many_values(text: str) -> None:
    assert parse_json(text.encode(), 5000)
    with pytest.raises(Refusal, match="more than 999 values"):
        parse_json(text.encode(), 999)


def test_signs_within_strings_are_not_values() -> None:
    text = ',[{"\\' * 1000
    assert parse_json(json.dumps([text, text]).encode(), 4) == [text, text]


def test_others_are_answered_while_a_body_is_parsed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, parsed, parse = threading.Event(), threading.Event(), body.parse_json

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert parsed.wait(60)
        return parse(*arguments)

    monkeypatch.setattr(body, "parse_json", slow)
    with serving(lambda: Scripted(tokenizer, ["x"])) as served, ThreadPoolExecutor() as pool:
        answer = pool.submit(served.ask, *asked())
        assert begun.wait(60) and served.ask("/health")[0] == served.ask("/v1/models")[0] == 200
        parsed.set()
        assert answer.result()[0] == 200


def test_a_text_that_cannot_fit_is_not_tokenized(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda: Engine(*load(checkpoint))) as served:
        tokenizer = served.service.worker.engine.tokenizer
        longest = max(map(len, tokenizer.get_vocab()))
        monkeypatch.setattr(type(tokenizer), "encode", None)
        for path in (TEXT, CHAT):
            text = "a" * (512 * longest + 1)
            changes = {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text}]}
            status, answer = served.ask(*asked(path, **changes))
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_that_does_not_come(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "TIME", 0.05)
    with serving(lambda: Scripted(tokenizer, [])) as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
            receive(connection, b"HTTP/1.1 408 ")


def test_bodies_at_once_are_bounded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MIB", 100)  # all together 6400
    with serving(lambda: Scripted(tokenizer, ["x"]), largest_body=1000) as served:
        connections = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(7)]
        for connection in connections:
            connection.sendall(CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        receive(connections[-1], b"HTTP/1.1 503 ")
        for connection in connections:
            connection.close()
        wait_for(lambda: served.ask(*asked())[0] == 200)


def test_requests_at_once_are_bounded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_resonance.server import app

    monkeypatch.setattr(app, "OTHERS", 0)
    with serving(lambda: Scripted(tokenizer, []), queue=2) as served:
        connections = [socket.create_connection(("127.0.0.1", served.port), timeout=60) for _ in range(2)]
        for connection in connections:
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        wait_for(lambda: served.ask("/v1/models")[0] == 503)
        assert served.ask("/health")[0] == 200
        for connection in connections:
            connection.close()
        wait_for(lambda: served.ask("/v1/models")[0] == 200)


def test_a_client_that_reads_nothing_loses_its_place(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SENDING", 0.05)
    monkeypatch.setattr(exchange, "_event", lambda _: "x" * 200_000)
    with serving(lambda: Scripted(tokenizer, ["x" * 3000, "next"]), queue=0) as served:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            request = json.dumps({"prompt": "x", "stream": True})
            connection.sendall(f"{HEAD}Content-Length: {len(request)}\r\n\r\n{request}".encode())
            engine: Any = served.service.worker.engine
            wait_for(lambda: engine.written)
            wait_for(lambda: served.service._inside == 0)
            assert served.ask(*asked())[0] == 200


def test_stop_tells_clients_before_the_engine_is_done(tokenizer: Any) -> None:
    steps, told = threading.Semaphore(1), list[Any]()
    engine: Any = Scripted(tokenizer, ["abc" * 100, "never"], steps)
    worker = Worker(engine)
    works = [Work([[1]], None, None, told.append) for _ in range(2)]  # type: ignore[arg-type]
    for work in works:
        worker.submit(work)
    owner = threading.Thread(target=worker.run, daemon=True)
    owner.start()
    wait_for(lambda: engine.written == 1)
    before = len(told)
    worker.stop()  # the engine waits in the middle of a token
    assert [str(event) for event in told[before:]] == ["the server stops", "None"] * 2
    steps.release()
    owner.join(60)
    assert not owner.is_alive() and engine.written == 2 and engine.closed.is_set()


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_stops_and_a_second_ends_the_process(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, ended = threading.Event(), list[int]()
    monkeypatch.setattr(os, "_exit", ended.append)
    handler = signal.getsignal(number)
    with signalled(stopped.set) as numbers:
        os.kill(os.getpid(), number)  # no exception is raised, here or anywhere
        assert stopped.wait(60) and numbers == [number] and not ended
        os.kill(os.getpid(), number)
        wait_for(lambda: ended == [130])
    assert signal.getsignal(number) is handler


def test_names_and_addresses(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_resonance.checkpoint import Checkpoint

    assert public_name(Checkpoint.open(checkpoint)) == "model"
    second = "127.0.0.2" if sys.platform == "linux" else "::1"  # a Mac has no other address of version 4
    families = {"127.0.0.1": socket.AF_INET, "127.0.0.2": socket.AF_INET, "::1": socket.AF_INET6}
    both = [(families[host], 1, 6, "", (host, 0)) for host in ("127.0.0.1", second)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with listen("localhost.example", 0) as listeners:
        addresses = [listener.getsockname() for listener in listeners]
        assert [address[0] for address in addresses] == ["127.0.0.1", second]
        assert addresses[0][1] == addresses[1][1] and all(map(is_loopback, listeners))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("0.0.0.0", 0))])
    with listen("localhost.example", 0) as (listener,):
        assert not is_loopback(listener)
