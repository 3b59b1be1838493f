"""Requests that the server refuses: in OpenAI's shape, before anything is computed, and it answers the next one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import load
from mlx_resonance.generation import Engine

import pytest

from .serving import CHAT, NAME, TEXT, Scripted, Served, ask, asked, serving


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    """A server of the tiny checkpoint."""
    with serving(lambda: Engine(*load(checkpoint))) as served:
        yield served


OF_TEXT = ("prompt", "echo", "best_of", "suffix")
WRONG: dict[str, tuple[str, bytes | str]] = {
    "not JSON": (CHAT, "{"),
    "not UTF-8": (TEXT, b'{"prompt": "\xff"}'),
    "UTF-16": (TEXT, '{"prompt": "x"}'.encode("utf-16")),
    "a byte order mark": (TEXT, b'\xef\xbb\xbf{"prompt": "x"}'),
    "nothing": (TEXT, b""),
    "no object": (CHAT, "[]"),
    "no messages": (CHAT, "{}"),
    "no prompt": (TEXT, "{}"),
    "deep": (TEXT, '{"metadata": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep, but less": (TEXT, '{"prompt": "x", "metadata": {"a": ' + "[" * 300 + "]" * 300 + "}}"),
    "a key twice": (TEXT, '{"prompt": "x", "prompt": "y"}'),
    "NaN": (TEXT, '{"prompt": "x", "temperature": NaN}'),
    "Infinity": (TEXT, '{"prompt": "x", "metadata": {"a": -Infinity}}'),
    "1e999": (TEXT, '{"prompt": "x", "temperature": 1e999}'),
    "a huge integer": (TEXT, '{"prompt": "x", "seed": 1' + "0" * 400 + "}"),
    "an even larger one": (TEXT, '{"prompt": "x", "metadata": {"a": 1' + "0" * 10_000 + "}}"),
    "half a surrogate pair": (TEXT, '{"prompt": "\\ud800"}'),
    "half a surrogate pair as a key": (TEXT, '{"prompt": "x", "\\udc00": 1}'),
    "a null character": (TEXT, '{"prompt": "a\\u0000b"}'),
} | {
    f"{key} {json.dumps(value)[:30]}": asked(TEXT if key in OF_TEXT else CHAT, **{key: value})
    for key, value in [
        ("messages", "text"), ("messages", None), ("messages", []), ("messages", {}), ("messages", [1]),
        ("messages", [{"content": "no role"}]), ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user"}]), ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x", "extra": 1}]),
        ("messages", [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]),
        ("prompt", 5), ("prompt", []), ("prompt", ""), ("prompt", [""]), ("prompt", [[]]), ("prompt", [5, "x"]),
        ("prompt", [True]), ("prompt", [2048]), ("prompt", [-1]), ("prompt", [1.5]), ("prompt", None),
        ("prompt", ["x"] * 65), ("echo", True), ("best_of", 2), ("suffix", "x"),
        ("max_tokens", "2"), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", True), ("max_tokens", 10**9),
        ("temperature", "hot"), ("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("top_k", 2048),
        ("min_p", 2), ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", "1"),
        ("stream", "yes"), ("stream_options", 5), ("stream_options", {"other": 1}), ("stop", 5), ("stop", [5]),
        ("stop", ["x"] * 65), ("seed", 2**80), ("seed", 1.5), ("n", 2), ("n", 0),
        ("logit_bias", {"a": 1}), ("logit_bias", {"1": None}), ("logit_bias", {"2048": 1}), ("logit_bias", {"1": 101}),
        ("logprobs", 1), ("top_logprobs", 21), ("top_logprobs", 1), ("stream_options", {"include_usage": True}),
        ("max_tokens", 1.5), ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "search"}]), ("tools", 5), ("tool_choice", "required"), ("functions", []), ("wrong", 1),
    ]
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_request_is_refused_in_openais_shape(server: Served, kind: str) -> None:
    path, body = WRONG[kind]
    status, answer = server.ask(path, body)
    assert status == 400, answer
    error = answer["error"]
    assert set(answer) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    key = kind.split()[0]
    if kind.endswith(("}", "]", '"', "true", "null")) or kind[-1].isdigit():
        assert key in error["message"] or error["param"] in (key, None), error


def test_messages_name_the_place(server: Served) -> None:
    def message(**changes: Any) -> str:
        return server.ask(*asked(CHAT, **changes))[1]["error"]["message"]

    assert message(wrong=1) == "Unrecognized request argument supplied: wrong"
    assert message(messages=[{"role": "user"}]) == "Missing required parameter: 'messages[0].content'"
    assert message(tools=[{"type": "function", "function": {}}]).endswith("'tools[0].function.name'")
    image = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]
    assert "reads text only, got a part of type 'image_url'" in message(messages=image)
    assert message(messages=None) == "Missing required parameter: 'messages'"
    empty, missing = (server.ask(*asked(prompt=prompt))[1]["error"]["message"] for prompt in ([], None))
    assert (empty, missing) == ("prompt: the prompt is empty", "Missing required parameter: 'prompt'")


@pytest.mark.parametrize(
    "changes",
    [
        {"reasoning_effort": "low"}, {"verbosity": "high"}, {"stop": ""}, {"stop": ["", "zzzz"]}, {"max_tokens": 1.0},
        {"messages": [{"role": "user", "content": None}, {"role": "user", "content": "x"}]}, {"top_logprobs": 0},
    ],
)  # fmt: skip
def test_what_ordinary_clients_send_is_accepted(server: Served, changes: dict[str, Any]) -> None:
    status, answer = server.ask(*asked(CHAT, **changes))
    assert status == 200 and answer["usage"]["completion_tokens"] <= 2, answer


def test_paths_methods_models_and_types(server: Served) -> None:
    assert server.ask("/health") == (200, {"status": "ok"})
    assert [model["id"] for model in server.ask("/v1/models")[1]["data"]] == [NAME]
    assert server.ask(f"/v1/models/{NAME}")[1]["id"] == NAME
    status, answer = server.ask(*asked(CHAT, model="other"))
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert server.ask("/v1/models/other")[0] == server.ask("/v1/nothing")[0] == 404
    assert server.ask(CHAT)[0] == server.ask("/health", b"")[0] == 405
    status, text = ask(server.port, "POST", *asked(), {"Content-Type": "text/plain"})  # what a web page may send
    assert status == 400 and b"Content-Type: application/json" in text
    assert ask(server.port, "HEAD", "/health") == (200, b"")
    assert server.ask("/v1/models/")[0] == server.ask(CHAT + "/", b"{}")[0] == 404  # not sent to another host


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:80", None, 200), ("LOCALHOST", None, 200), ("[::1]:8080", "http://[::1]:3000", 200),
        ("localhost", "http://localhost:3000", 200), ("evil.example:8080", "http://evil.example:8080", 421),
        ("localhost.evil.example", None, 421), ("127.0.0.1:80", "http://evil.example", 403), ("", None, 421),
        ("localhost", "null", 403),
    ],
)  # fmt: skip
def test_pages_of_other_sites_reach_nothing(server: Served, host: str, origin: str | None, status: int) -> None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    for path, body in (("/v1/models", None), asked()):
        assert server.ask(path, body, **headers)[0] == status


def test_a_model_without_a_context_and_its_names(tokenizer: Any) -> None:
    def unbounded() -> Any:
        engine = Scripted(tokenizer, ["x", "y"])
        engine.context = None  # type: ignore[assignment]
        return engine

    with serving(unbounded, other_name="a/folder") as served:
        assert served.ask(*asked(max_tokens=None, model="a/folder"))[1]["model"] == NAME
        assert served.ask(*asked(max_tokens=5, model=NAME))[0] == 200
        assert served.service.worker.engine.lengths == [4096, 5]  # type: ignore[attr-defined]


def test_a_key(checkpoint: Path) -> None:
    with serving(lambda: Engine(*load(checkpoint)), key="s3cret") as served:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            for path in ("/v1/models", "/openapi.json", "/v1/nothing"):
                status, answer = served.ask(path, **given)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert served.ask("/v1/models", Authorization="Bearer s3cret")[0] == 200
        assert served.ask("/health")[0] == 200
