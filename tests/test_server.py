"""`mlx-resonance lm server` as clients meet it: OpenAI's own, many at once, and some that err."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

COMMAND = [Path(sys.executable).with_name("mlx-resonance"), "lm", "server"]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "import os\n\n\ndef walk(top):\n"}]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a server: offline, with a Hugging Face cache that does not exist yet."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home") / "huggingface")}


@pytest.fixture(scope="module")
def port(extended: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[int]:
    """The port of a server with the tiny checkpoint converted with Resonance-YaRN × 8."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*COMMAND, "--model", extended, "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert ask(port, "GET", "/health")[0] == 200
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
        yield port
        assert server.poll() is None, (folder / "log").read_text()
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    """OpenAI's client, without retries or a proxy."""
    import openai

    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120, http_client=http_client
    ) as client:
        yield client


def ask(port: int, method: str, path: str, body: bytes | str | None = None) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def chat(client: Any, text: str = MESSAGES[0]["content"], **options: Any) -> Any:
    """A greedy chat completion."""
    messages = [{"role": "user", "content": text}]
    settings = {"model": "default_model", "temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(messages=messages, **settings)


def test_models_names_the_folder(client: Any) -> None:
    (model,) = client.models.list().data
    assert Path(model.id).is_dir()


def test_chat_completion_whole_and_streamed(client: Any) -> None:
    whole = chat(client)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and whole.usage.completion_tokens == 12
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert len(chunks) > 2 and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12


def test_a_prompt_longer_than_the_training_context(client: Any) -> None:
    assert chat(client, "import os\nimport re\n" * 150).usage.prompt_tokens > 512


def test_sixteen_at_once_get_the_answers_of_one_at_a_time(client: Any) -> None:
    texts = [f"def function_{i}({', '.join('abcdefgh'[: i % 8])}):\n    " for i in range(16)]
    alone = [chat(client, text).choices[0].message.content for text in texts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda text: chat(client, text).choices[0].message.content, texts))
    assert together == alone and len(set(alone)) > 1


def body(**changes: Any) -> str:
    return json.dumps({"messages": MESSAGES, "max_tokens": 2} | changes)


MALFORMED: dict[str, tuple[str, bytes | str]] = {
    "not JSON": (CHAT, "{"),
    "not UTF-8": (CHAT, b'{"messages": "\xff"}'),
    "no object": (CHAT, "[]"),
    "no messages": (CHAT, "{}"),
    "no prompt": (TEXT, "{}"),
    "unknown route": ("/v1/nothing", body()),
} | {
    f"{key} {json.dumps(value)[:20]}": (TEXT if key == "prompt" else CHAT, body(**{key: value}))
    for key, value in [
        ("messages", "text"), ("messages", None), ("messages", []), ("messages", {}), ("messages", [1]),
        ("messages", [{"content": "no role"}]), ("messages", [{"role": "user", "content": 5}]),
        ("prompt", 5), ("prompt", []), ("prompt", ["text"]),
        ("max_tokens", "2"), ("max_tokens", -1), ("temperature", "hot"), ("temperature", None),
        ("temperature", float("nan")), ("stream", "yes"), ("stream_options", 5), ("model", 5), ("model", "no/such"),
        ("stop", 5), ("stop", [5]), ("stop", [["a"]]), ("seed", -1), ("seed", 2**80), ("top_k", 10**6),
        ("presence_penalty", 10**400), ("repetition_context_size", 10**30),
        ("logit_bias", {"a": 1}), ("logit_bias", {"1": None}), ("logit_bias", {"99999999": 1}),
    ]
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_refused_and_the_server_lives_on(port: int, kind: str) -> None:
    status, answer = ask(port, "POST", *MALFORMED[kind])
    assert 400 <= status < 500, answer
    assert kind == "unknown route" or json.loads(answer)["error"] not in ("", "generation thread died")
    assert ask(port, "POST", CHAT, body())[0] == 200
    assert ask(port, "GET", "/health")[0] == 200


def test_settings_within_their_range_are_accepted(client: Any, port: int) -> None:
    options = {"temperature": 1, "top_p": 0.9, "stop": ["\n\n"], "logit_bias": {"5": -1}, "presence_penalty": 0.5}
    first, second = (chat(client, seed=7, extra_body={"top_k": 40}, **options) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    parts = [{"type": "text", "text": "import os\n"}]
    assert client.chat.completions.create(
        model="default_model", messages=[{"role": "user", "content": parts}], max_tokens=2
    ).choices
    # In OpenAI's API, include_usage may be missing.
    status, stream = ask(port, "POST", CHAT, body(stream=True, stream_options={}))
    assert status == 200 and stream.endswith(b"data: [DONE]\n\n")


def test_a_client_that_hangs_up_harms_no_other(client: Any, port: int) -> None:
    expected = chat(client).choices[0].message.content
    request = body(stream=True, max_tokens=2000)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(request)}\r\n\r\n{request}".encode())
            received = b""
            while b'"delta"' not in received:
                piece = connection.recv(4096)
                assert piece
                received += piece
            # Close by a reset, as a killed client does.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert chat(client).choices[0].message.content == expected
    assert ask(port, "GET", "/health")[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*COMMAND, "--model", tmp_path / "missing", "--port", "0"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    # Anywhere in the output: the listening thread may still print after it.
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
