"""`mlx-resonance server` as clients meet it: OpenAI's own, and some that err or hang up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_resonance import generate, load
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.generation import Engine, PromptCache, Sampling, cache_key
from mlx_resonance.server.answers import TextAnswer
from mlx_resonance.server.responses import TokenLogprob
from mlx_resonance.server.worker import Piece

import mlx.core as mx
import pytest

from .checkpoints import prompt
from .serving import CHAT, NAME, PROMPT, TEXT, Served, ask, serving, with_template


@pytest.fixture(scope="module")
def chatty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    return with_template(checkpoint, tmp_path_factory.mktemp("chatty") / "model")


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Served]:
    """A server of it."""
    with serving(lambda: Engine(*load(chatty))) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    """OpenAI's client, without retries or a proxy."""
    import openai

    url, http_client = f"http://127.0.0.1:{server.port}/v1", openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120, http_client=http_client) as client:
        yield client


@pytest.fixture(scope="module")
def ours(chatty: Path) -> Any:
    """ours(tokens or text, **options): the text that Python's `generate` makes."""
    model, tokenizer = load(chatty)
    return lambda prompt, **options: generate(model, tokenizer, prompt, **{"max_tokens": 12} | options)


def chat(client: Any, **options: Any) -> Any:
    """A greedy chat completion."""
    settings = {"model": NAME, "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": PROMPT}]}
    return client.chat.completions.create(**settings | options)


def test_chat_whole_and_streamed_is_the_text_of_generate(client: Any, ours: Any) -> None:
    expected = ours(f"# user: {PROMPT}\n")
    whole = chat(client)
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    assert whole.usage.completion_tokens == 12 and whole.model == NAME and whole.id.startswith("chatcmpl-")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == "length" and len(chunks) > 4
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert not any(chunk.usage for chunk in chat(client, stream=True))


def test_prompts_as_text_ids_and_lists(client: Any, ours: Any, tokenizer: Any) -> None:
    texts = [PROMPT, "class Point:\n    def "]
    expected = [ours(text) for text in texts]
    ids = [tokenizer.encode(text) for text in texts]
    for given in (texts, ids):
        done = client.completions.create(model="default", prompt=given, max_tokens=12, temperature=0)
        assert [choice.text for choice in done.choices] == expected
        assert done.usage.prompt_tokens == sum(map(len, ids)) and done.usage.completion_tokens == 24
        one = client.completions.create(model=NAME, prompt=given[1], max_tokens=12, temperature=0)
        assert one.choices[0].text == expected[1] and one.object == "text_completion"
    stream = client.completions.create(model=NAME, prompt=texts, max_tokens=12, temperature=0, stream=True)
    parts = [chunk.choices[0] for chunk in stream]
    assert ["".join(part.text for part in parts if part.index == i) for i in (0, 1)] == expected


def test_log_probabilities_are_the_models(client: Any, chatty: Path) -> None:
    model, tokenizer = load(chatty)
    done = chat(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = tokenizer.encode(f"# user: {PROMPT}\n")
    for entry in done.logprobs.content:
        row = model(mx.array([tokens]))[0, -1]
        row = row - mx.logsumexp(row)
        best = mx.argsort(-row)[:3].tolist()
        assert entry.token == tokenizer.decode([best[0]]) and bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == pytest.approx(row[best[0]].item(), abs=1e-3)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(row[mx.array(best)].tolist(), abs=1e-3)
        tokens.append(best[0])
    assert "".join(entry.token for entry in done.logprobs.content) == done.message.content
    streamed = [chunk.choices[0].logprobs for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)]
    assert [entry for part in streamed if part for entry in part.content] == done.logprobs.content
    text = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2).choices[0]
    assert "".join(text.logprobs.tokens) == text.text
    assert text.logprobs.text_offset[2] == len("".join(text.logprobs.tokens[:2]))
    best = [max(top.values()) for top in text.logprobs.top_logprobs]
    assert best == text.logprobs.token_logprobs and all(len(top) == 2 for top in text.logprobs.top_logprobs)


def test_parts_of_characters_have_names_bytes_and_places(server: Served, tokenizer: Any) -> None:
    def bias(*ids: int) -> dict[str, Any]:
        return {"logit_bias": {str(number): 100 for number in ids}, "max_tokens": 3, "temperature": 0}

    text = "\u6f22"
    parts = tokenizer.encode(text, add_special_tokens=False)
    assert len(parts) == 3  # none of them has a text
    first = {"prompt": "x", "logprobs": 2} | bias(parts[0], parts[1])
    done = server.ask(TEXT, first)[1]["choices"][0]["logprobs"]
    names = {"bytes:\\xe6", "bytes:\\xbc"}
    assert all(set(top) == names for top in done["top_logprobs"]) and set(done["tokens"]) <= names
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True} | bias(parts[0])
    entry = server.ask(CHAT, chat)[1]["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"]) == ("bytes:\\xe6", [0xE6])
    piece = Piece(0, "", None, 1, 0, 1, None)
    answer = TextAnswer("m", 1, 0)
    tokens = [("a", b"a"), *((f"bytes:{byte}", bytes([byte])) for byte in text.encode()), ("b", b"b")]
    for name, found in tokens:
        logprob = TokenLogprob(token=name, logprob=0.0, bytes=list(found), top_logprobs=[])
        list(answer.add(replace(piece, text=text if name == "b" else "", logprob=logprob)))
    assert answer.whole().choices[0].logprobs.text_offset == [0, 1, 1, 1, 2]


def test_kv_bits_and_the_cache_on_disk(checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    model, _ = load(checkpoint)
    tokens = prompt(tokenizer, 300)
    expected = generate(model, tokenizer, [*tokens, 9], kv_bits=8, max_tokens=16)

    def engine() -> Engine:
        key = cache_key(Checkpoint.open(checkpoint), 8)
        kept = PromptCache(tmp_path / "cache", key, 10**9)
        return Engine(*load(checkpoint), kv_bits=8, disk_cache=kept)

    def cached(served: Served, last: int) -> int:
        status, done = served.ask(TEXT, {"prompt": [*tokens, last], "max_tokens": 16, "temperature": 0})
        assert status == 200 and (last != 9 or done["choices"][0]["text"] == expected)
        return int(done["usage"]["prompt_tokens_details"]["cached_tokens"])

    with serving(engine) as served:
        assert cached(served, 8) == 0 and cached(served, 9) == 300  # the second from memory
    with serving(engine) as served:
        assert cached(served, 9) > 250  # from disk


def test_settings_do_what_they_say(client: Any, server: Served, ours: Any) -> None:
    full = ours(PROMPT, max_tokens=40)
    stop = full[10:13]
    done = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "\0x"[1:] * 9]
    )
    assert done.choices[0].text == full[: full.index(stop)] and done.choices[0].finish_reason == "stop"
    seeds = [chat(client, seed=seed, temperature=1, max_tokens=20).choices[0].message.content for seed in (7, 7, -8)]
    assert seeds[0] == seeds[1] != seeds[2]
    first = server.ask(TEXT, {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1})[1]["choices"][0]
    (token,) = load_tokens(server, first["logprobs"]["tokens"][0])
    for other in ({"logit_bias": {str(token): -100}}, {"top_k": 1, "temperature": 1}):
        again = server.ask(TEXT, {"prompt": PROMPT, "max_tokens": 1, "temperature": 0} | other)[1]["choices"][0]
        assert (again["text"] == first["text"]) is ("top_k" in other)
    repeated = {"prompt": "a a a a a a a a", "max_tokens": 30, "temperature": 0}
    plain = server.ask(TEXT, repeated)[1]["choices"][0]["text"]
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert server.ask(TEXT, repeated | {penalty: 2})[1]["choices"][0]["text"] != plain


def load_tokens(server: Served, text: str) -> list[int]:
    return list(server.service.worker.engine.tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def small(chatty: Path) -> Iterator[Served]:
    """A server of it with a context of 64 tokens, which one answer fills in no time."""
    with serving(lambda: Engine(*load(chatty), context=64)) as served:
        yield served


def test_null_is_the_default(small: Served) -> None:
    for path, asked in ((CHAT, {"messages": [{"role": "user", "content": PROMPT}]}), (TEXT, {"prompt": PROMPT})):
        schema = json.loads(ask(small.port, "GET", "/openapi.json")[1])
        reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        fields = schema["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        nulls = dict.fromkeys(set(fields) - set(asked))
        assert len(nulls) > 20
        status, done = small.ask(path, nulls | asked)
        assert status == 200, done
        # To the end of the context, or of the text.
        used = done["usage"]["total_tokens"]
        assert used == 64 if done["choices"][0]["finish_reason"] == "length" else used < 64


def test_defaults_of_the_server(checkpoint: Path) -> None:
    sampling = Sampling(temp=1.0, top_k=1)
    with serving(lambda: Engine(*load(checkpoint)), sampling=sampling, max_tokens=3) as served:
        greedy, other = ({"prompt": PROMPT}, {"prompt": PROMPT, "max_tokens": 5})
        assert served.ask(TEXT, greedy)[1]["usage"]["completion_tokens"] == 3
        assert served.ask(TEXT, other)[1]["usage"]["completion_tokens"] == 5
        texts = {served.ask(TEXT, greedy | {"seed": seed})[1]["choices"][0]["text"] for seed in range(4)}
        assert len(texts) == 1
        assert served.ask(TEXT, {"prompt": [5] * 511})[1]["usage"]["completion_tokens"] == 1  # what there is room for
        several = served.ask(TEXT, {"prompt": [[5] * 511, [5] * 20]})[1]
        assert several["usage"]["completion_tokens"] == 1 + 3  # to each prompt its own


def test_the_context_is_checked_with_the_longest_prompt_that_fits(small: Served) -> None:
    status, answer = small.ask(TEXT, {"prompt": [5] * 80, "max_tokens": 10})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert "a prompt of up to 54 fits" in answer["error"]["message"]
    assert small.ask(TEXT, {"prompt": [5] * 54, "max_tokens": 10})[0] == 200
    assert small.ask(TEXT, {"prompt": [5] * 55, "max_tokens": 10})[0] == 400
    assert small.ask(TEXT, {"prompt": [5] * 64})[1]["error"]["code"] == "context_length_exceeded"
