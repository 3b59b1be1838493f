"""The server under load: many clients, clients that hang up, large bodies, signals; nothing ends the process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.generation import Engine

import pytest

from .serving import CHAT, COMMAND, PROMPT, TEXT, Scripted, ask, serving

LONG = "abc" * 1000
HEAD = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@contextmanager
def sent(port: int, stream: bool = True) -> Iterator[socket.socket]:
    """A connection over which a request was sent; closed by a reset, as a killed client does."""
    request = json.dumps({"prompt": PROMPT, "stream": stream})
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(request)}\r\n\r\n{request}".encode())
        yield connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def receive(connection: socket.socket, text: bytes) -> None:
    """Read until some text has come."""
    received = b""
    while text not in received:
        piece = connection.recv(4096)
        assert piece, received
        received += piece


@pytest.fixture
def withdrawn(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released whenever a request was withdrawn."""
    from mlx_resonance.server.worker import Worker

    happened, withdraw = threading.Semaphore(0), Worker.withdraw

    def withdraw_and_say(self: Any, work: Any) -> None:
        withdraw(self, work)
        happened.release()

    monkeypatch.setattr(Worker, "withdraw", withdraw_and_say)
    return happened


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_answer_within_a_token(
    tokenizer: Any, withdrawn: threading.Semaphore, stream: bool
) -> None:
    steps = threading.Semaphore(3)
    with serving(lambda: Scripted(tokenizer, [LONG, "next"], steps)) as served:
        engine: Any = served.service.worker.engine
        with sent(served.port, stream) as connection:
            if stream:
                receive(connection, b'"abc"')
            wait_for(lambda: engine.written == 3)
        assert withdrawn.acquire(timeout=120)
        steps.release()  # the token that is being made; no other is
        assert engine.closed.wait(120) and engine.written == 4
        steps.release(100)
        assert served.ask(TEXT, {"prompt": "x"})[1]["choices"][0]["text"] == "next"


def test_a_client_that_hangs_up_leaves_the_queue(tokenizer: Any, withdrawn: threading.Semaphore) -> None:
    steps = threading.Semaphore(1)
    with serving(lambda: Scripted(tokenizer, ["one", "three"], steps), queue=1) as served, ThreadPoolExecutor() as pool:
        worker = served.service.worker
        first = pool.submit(served.ask, TEXT, {"prompt": "x"})
        wait_for(lambda: worker.engine.written == 1)
        with sent(served.port):  # which would get the second answer
            wait_for(lambda: len(worker._waiting) == 1)
            status, answer = served.ask(TEXT, {"prompt": "x"})
            assert (status, answer["error"]["code"]) == (503, "queue_full")
        assert withdrawn.acquire(timeout=120)
        wait_for(lambda: served.service._inside == 1)
        third = pool.submit(served.ask, TEXT, {"prompt": "x"})  # has a place while the first is still written
        wait_for(lambda: len(worker._waiting) == 1)
        steps.release(100)
        assert [done.result()[1]["choices"][0]["text"] for done in (first, third)] == ["one", "three"]


def test_a_stream_that_waits_says_so(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_resonance.server import exchange

    monkeypatch.setattr(exchange, "PATIENCE", 0.01)
    steps = threading.Semaphore(0)
    with serving(lambda: Scripted(tokenizer, ["one"], steps)) as served, sent(served.port) as connection:
        receive(connection, b": waiting\n\n")
        steps.release(10)
        receive(connection, b"data: [DONE]\n\n")


def test_one_after_another_in_order_and_a_full_queue(tokenizer: Any) -> None:
    steps = threading.Semaphore(1)
    with (
        serving(lambda: Scripted(tokenizer, map(str, range(10)), steps), queue=3) as served,
        ThreadPoolExecutor() as pool,
    ):
        worker = served.service.worker
        answers = []
        for waiting in range(4):
            answers.append(pool.submit(served.ask, TEXT, {"prompt": "x"}))
            wait_for(lambda waiting=waiting: len(worker._waiting) == waiting and worker.engine.written)
        with sent(served.port) as connection:
            receive(connection, b"retry-after: 1\r\n")
        assert served.ask("/health")[0] == served.ask("/v1/models")[0] == 200
        steps.release(1000)
        assert [done.result()[1]["choices"][0]["text"] for done in answers] == ["0", "1", "2", "3"]
        assert served.ask(TEXT, {"prompt": "x"})[0] == 200


@pytest.mark.long
def test_32_clients_at_once_get_the_answers_of_one_at_a_time(checkpoint: Path) -> None:
    with serving(lambda: Engine(*load(checkpoint)), queue=31) as served:

        def answer(i: int) -> Any:
            body = {"prompt": f"def function_{i}({', '.join('abcdefgh'[: i % 8])}):\n    ", "max_tokens": 8}
            if i % 2:
                return "".join(event["choices"][0]["text"] for event in served.events(TEXT, body)[:-1])
            status, done = served.ask(TEXT, body)
            return done["choices"][0]["text"] if status == 200 else done

        alone = [answer(i) for i in range(32)]
        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(answer, range(32))) == alone
        assert len(set(alone)) > 4


@pytest.fixture(scope="module")
def process(extended: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The command as a process, and its port."""
    with command(extended, tmp_path_factory.mktemp("log")) as (port, server):
        yield port, server
        assert server.poll() is None


@contextmanager
def command(model: Path, folder: Path, **environment: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port of a server in another process."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        arguments = [*COMMAND, "-m", str(model), "--port", "0", "--no-prompt-cache", "--queue", "32"]
        server = subprocess.Popen(arguments, stdout=out, stderr=err, env=os.environ | environment)
    try:

        def port() -> Any:
            said = (folder / "err").read_text()
            assert server.poll() is None, said
            return re.search(r"listening on http://127\.0\.0\.1:(\d+)/v1\n", said)

        yield int(wait_for(port)[1]), server
    finally:
        server.kill()
        server.wait()


def resident(server: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that a process holds."""
    return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(server.pid)]))


def test_a_body_of_100_mb_is_refused_before_it_is_read(process: tuple[int, subprocess.Popen[bytes]]) -> None:
    port, server = process
    ask(port, "POST", TEXT, {"prompt": "x", "max_tokens": 1})
    before = resident(server)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100000000\r\n\r\n".encode())
        receive(connection, b"HTTP/1.1 413 ")  # before a byte of it was sent
    assert ask(port, "POST", TEXT, b"x" * 10**8)[0] == 413
    part = b"%x\r\n%s\r\n" % (2**20, b"x" * 2**20)
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection, pytest.raises(ConnectionError):
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + part * 100)
    assert resident(server) - before < 60e6
    assert ask(port, "POST", TEXT, {"prompt": "x", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("requests", [20, pytest.param(200, marks=pytest.mark.long)])
def test_memory_stays_flat(process: tuple[int, subprocess.Popen[bytes]], requests: int) -> None:
    port, server = process

    def round_trip(i: int) -> None:
        messages = [{"role": "user", "content": f"{i}\n" + PROMPT * 8}]
        body = {"messages": messages, "max_tokens": 8, "stream": bool(i % 2), "logprobs": True, "top_logprobs": 5}
        assert ask(port, "POST", CHAT, body)[0] == 200
        if i % 10 == 0:
            with sent(port) as connection:
                receive(connection, b'"text"')
            assert ask(port, "POST", CHAT, b"{" * 10_000)[0] == 400

    for i in range(20):
        round_trip(i)
    before = resident(server)
    for i in range(requests):
        round_trip(i)
    assert resident(server) - before < 20e6


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 0), pytest.param(signal.SIGHUP, 0, marks=pytest.mark.long)],
)
def test_a_signal_ends_the_server_and_the_answer_in_progress(
    extended: Path, tmp_path: Path, number: int, code: int
) -> None:
    with command(extended, tmp_path, MLX_RESONANCE_API_KEY="secret") as (port, server):
        assert ask(port, "POST", TEXT, {"prompt": "x"})[0] == 401
        connection = socket.create_connection(("127.0.0.1", port), timeout=120)
        body = json.dumps({"prompt": PROMPT, "stream": True, "logit_bias": {"1": -100}})  # 4096 tokens
        head = f"{HEAD}Authorization: Bearer secret\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        receive(connection, b'"text"')
        server.send_signal(number)
        receive(connection, b"the server stops")
        connection.close()
        assert server.wait(120) == code
    assert (tmp_path / "out").read_bytes() == b""
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said and "walk" not in said and "secret" not in said
    assert re.search(r"^127\.0\.0\.1 POST /v1/completions 401, ", said, re.MULTILINE)


def test_what_cannot_be_served_is_one_line(run: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("server", "-m", "no/such", "--port", port)  # before the model is looked for
        assert (code, out, err.count("\n")) == (2, "", 1) and f"cannot listen on 127.0.0.1 port {port}: " in err
    code, _, err = run("server", "-m", checkpoint, "--port", 0, "--context", 1000)
    assert code == 2 and "512" in err.splitlines()[-1]
    assert run("server", "-m", checkpoint, "--api-key", "")[::2] == (
        2,
        run("server", "-m", checkpoint, "--api-key", " ")[2],
    )
    monkeypatch.setenv("MLX_RANK", "0")
    code, out, err = run("server", "-m", checkpoint)
    assert (code, out, err.count("\n")) == (2, "", 1) and "mlx.launch" in err
    monkeypatch.delenv("MLX_RANK")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, out, err = run("server", "-m", checkpoint)
    assert (code, out, err.count("\n")) == (2, "", 1) and "pip install '.[server]'" in err


def test_a_host_that_others_reach_without_a_key_is_said(run: Any, checkpoint: Path) -> None:
    options = ("server", "-m", checkpoint, "--host", "0.0.0.0", "--port", 0, "--context", 1000)
    assert "warning: everyone who reaches 0.0.0.0 can use this server: it has no --api-key" in run(*options)[2]
    assert "warning: everyone" not in run(*options, "--api-key", "x")[2]
