"""Calls of tools and reasoning in what a scripted engine writes, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.errors import DeviceError
from mlx_resonance.server.logprobs import logprob_of
from mlx_resonance.server.sections import Sections

import mlx.core as mx
import numpy as np
import pytest

from .serving import CHAT, TEXT, Scripted, asked, serving, with_template

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def chatty(stdlib_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    return with_template(stdlib_llama, tmp_path_factory.mktemp("chatty") / "model")


def scripted(chatty: Path, *texts: Any, **options: Any) -> Any:
    tokenizer = Checkpoint.open(chatty).tokenizer
    return serving(lambda: Scripted(tokenizer, texts), **options)


CALL = 'Let me see.<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ASK = {"messages": [{"role": "user", "content": "Weather?"}], "tools": TOOLS}


def test_a_call_of_a_tool_whole_and_streamed(chatty: Path) -> None:
    with scripted(chatty, CALL, CALL, CALL) as served:
        choice = served.ask(CHAT, ASK)[1]["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function" and call["function"]["name"] == "weather" and "index" not in call
        assert json.loads(call["function"]["arguments"]) == {"city": "Zürich"}
        *chunks, done = served.events(CHAT, ASK)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert done == "[DONE]" and "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
        assert sum(bool(delta.get("content")) for delta in deltas) > 1  # content comes before the call is whole
        ((streamed,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        assert streamed["index"] == 0 and streamed["function"] == call["function"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        # The model sees the tools, except where the request says that it must call none.
        plain = served.ask(CHAT, ASK | {"tool_choice": "none"})[1]["choices"][0]
        assert plain["message"]["content"] == CALL and plain["finish_reason"] == "stop"
        engine = served.service.worker.engine
        texts = [engine.tokenizer.decode(tokens) for tokens in engine.prompts]
        assert "weather" in texts[0] and texts[0] == texts[1] and "weather" not in texts[2]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>weather</tool_call>", "<tool_call>[1]</tool_call> x", '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "weather", "argu', '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        "<tool_ca", '<tool_call>{"name": "weather", "arguments": {"city": "\\ud83d"}}</tool_call>',
        '<tool_call>{"name": "weather\\ud83d", "arguments": {}}</tool_call>',
    ],
)  # fmt: skip
def test_what_is_not_a_call_is_content(chatty: Path, text: str) -> None:
    with scripted(chatty, text, text) as served:
        choice = served.ask(CHAT, ASK)[1]["choices"][0]
        assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        chunks = served.events(CHAT, ASK)[:-1]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


def test_several_calls_and_their_results(chatty: Path) -> None:
    two = CALL + CALL
    with scripted(chatty, two, "Fine.", two, two) as served:
        message = served.ask(CHAT, ASK)[1]["choices"][0]["message"]
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in message["tool_calls"]]
        status, answer = served.ask(CHAT, {"messages": [*ASK["messages"], message, *results], "tools": TOOLS})
        assert status == 200 and answer["choices"][0]["message"]["content"] == "Fine."
        engine = served.service.worker.engine
        assert "<tool_call>weather Zürich</tool_call>" in engine.tokenizer.decode(engine.prompts[1])
        single = ASK | {"parallel_tool_calls": False}
        (call,) = served.ask(CHAT, single)[1]["choices"][0]["message"]["tool_calls"]
        events = [event["choices"][0]["delta"] for event in served.events(CHAT, single)[:-1]]
        assert call["type"] == "function" and sum("tool_calls" in delta for delta in events) == 1


def test_tools_of_a_model_that_has_none(checkpoint: Path) -> None:
    with scripted(checkpoint, "x") as served:
        status, answer = served.ask(CHAT, ASK)
        assert status == 400 and answer["error"]["param"] == "tools"
        assert served.ask(CHAT, ASK | {"tool_choice": "none"})[0] == 200
        status, answer = served.ask(*asked(CHAT, messages=[{"role": "developer", "content": "x"}]))
        assert status == 400 and "no place for a system prompt" in answer["error"]["message"]


def test_a_template_that_fails(chatty: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatty, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with scripted(folder) as served:
        status, answer = served.ask(*asked(CHAT))
        assert status == 400 and "chat template fails: TemplateError: no such role" in answer["error"]["message"]


def test_reasoning_is_apart(tokenizer: Any) -> None:
    thinking = SimpleNamespace(
        has_thinking=True, think_start="<think>", think_end="</think>", decode=tokenizer.decode,
        has_tool_calling=True, tool_call_start="[CALL]", tool_call_end="",
    )  # fmt: skip
    text = "<think>a < b</think>c</think> [CALL]f() <think>"
    expected = [("reasoning", "a < b"), ("content", "c</think> "), ("tool", "f() <think>")]
    for size in (1, 2, 5, 100):
        sections, found = Sections(thinking, [5], True), list[Any]()
        for section in [
            s for i in range(0, len(text), size) for s in sections.add(text[i : i + size])
        ] + sections.finish():
            if found and found[-1][0] == section.kind:
                found[-1] = (section.kind, found[-1][1] + section.text)
            else:
                found.append((section.kind, section.text))
        assert found == expected
    begun = Sections(thinking, tokenizer.encode("user\n<think>"), False)
    assert [(s.kind, s.text) for s in begun.add("why</think>so[CALL]")] == [
        ("reasoning", "why"),
        ("content", "so[CALL]"),
    ]
    for question in ("what is <think>?\nassistant\n", "<think>a</think> <think> b"):
        mentioned = Sections(thinking, tokenizer.encode(question), False)
        assert [(s.kind, s.text) for s in [*mentioned.add("It is"), *mentioned.finish()]] == [("content", "It is")]


def test_an_error_of_the_engine_ends_only_its_request(chatty: Path) -> None:
    errors = [RuntimeError("secret of the server"), DeviceError("the GPU gave up")]
    with scripted(chatty, *errors, *errors, "fine") as served:
        for message in ("an error in the server", "the GPU gave up"):
            status, answer = served.ask(*asked())
            assert status == 500 and answer["error"]["type"] == "server_error" and message in answer["error"]["message"]
        for message in ("an error in the server", "the GPU gave up"):
            *_, last = served.events(TEXT, {"prompt": "x"})
            assert message in last["error"]["message"] and "secret" not in json.dumps(last)
        assert served.ask(*asked())[1]["choices"][0]["text"] == "fine"


def test_log_probabilities_of_16_bit_models_are_those_of_their_logits(tokenizer: Any) -> None:
    """Their sum over the vocabulary is rounded to eighths where it is between 16 and 32."""
    logits = mx.array([20.0, *[11.0] * 500, *[-4.0] * 1547], mx.bfloat16)
    exact = np.array(logits.astype(mx.float32), np.float64)
    exact -= np.log(np.exp(exact).sum())
    response: Any = SimpleNamespace(logprobs=logits - mx.logsumexp(logits), token=0)
    found = logprob_of(tokenizer, response, 3)
    assert found.logprob == pytest.approx(exact[0], abs=0.01) and found.logprob < -0.04
    assert [each.logprob for each in found.top_logprobs] == pytest.approx([exact[0], *[exact[1]] * 2], abs=0.01)
