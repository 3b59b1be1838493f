"""`mlx-resonance lm server`, which is mlx-lm's own, with our angles."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

COMMAND = [Path(sys.executable).with_name("mlx-resonance"), "lm", "server"]
PROMPT = "import os\n\n\ndef walk(top):\n"


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


def chat(client: Any, text: str = PROMPT, **options: Any) -> Any:
    """A greedy chat completion."""
    messages = [{"role": "user", "content": text}]
    settings = {"model": "default_model", "temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(messages=messages, **settings)


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
