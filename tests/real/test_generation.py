"""Every way to an answer from SmolLM2: the command, the prompt cache, KV formats, a batch, processes, a server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mlx_resonance import generate, stream_generate
from mlx_resonance.generation import PromptCache, prompt_tokens

import mlx.core as mx
import pytest

from ..test_distributed import MAIN, start
from .prompts import CAPITAL, KEY, with_key

pytestmark = pytest.mark.real

CAPITALS = {"France": "Paris", "Germany": "Berlin", "Japan": "Tokyo", "Italy": "Rome"}


def test_the_command_names_the_capital(run: Any, smollm2_32k: Path) -> None:
    code, out, err = run("generate", "--model", smollm2_32k, "--prompt", CAPITAL, "--max-tokens", 24)
    assert code == 0 and out.startswith("The capital of France is Paris"), err


def test_a_second_question_on_a_document_reads_the_question_only(loaded: Any, tmp_path: Path) -> None:
    """The keys of the document are those of the first question, from the prompt cache on disk."""
    model, tokenizer = loaded
    document = with_key(tokenizer, 300)
    question = tokenizer.encode(f" {KEY}.\n\nThe capital city of France is called", add_special_tokens=False)
    answers, read = [], []
    for prompt in (document, document + question):
        done: list[int] = []
        responses = stream_generate(
            model, tokenizer, prompt, max_tokens=6, disk_cache=PromptCache(tmp_path, "key"),
            prompt_progress_callback=lambda part, _, done=done: done.append(part),
        )  # fmt: skip
        answers.append("".join(response.text for response in responses))
        read.append(len(prompt) - done[0])
    assert KEY in answers[0] and "Paris" in answers[1]
    assert read[0] == 300 and read[1] <= len(question)


@pytest.mark.parametrize("kv_bits", [8, (8, 4), 4])
def test_a_quantized_kv_cache_names_the_capital_and_copies_a_key(loaded: Any, kv_bits: Any) -> None:
    """Keys in 4 bits cost an eighth of the perplexity: whether a digit changes then depends on the processor."""
    model, tokenizer = loaded
    tokens = prompt_tokens(tokenizer, "What is the capital of Japan?", True)
    assert "Tokyo" in generate(model, tokenizer, tokens, max_tokens=12, kv_bits=kv_bits)
    if kv_bits != 4:
        assert KEY in generate(model, tokenizer, with_key(tokenizer, 300), max_tokens=6, kv_bits=kv_bits)


def test_a_batch_answers_each_question(run: Any, loaded: Any, smollm2_32k: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded
    questions = {country: f"What is the capital of {country}?" for country in CAPITALS}
    lines = [json.dumps({"id": country, "prompt": question}) for country, question in questions.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    files = ("--prompts-file", tmp_path / "prompts.jsonl", "--output", tmp_path / "answers.jsonl")
    code, _, err = run("generate", "--model", smollm2_32k, *files, "--max-tokens", 12)
    assert code == 0, err
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()[1:])
    texts = {answer["id"]: answer["text"] for answer in answers}
    assert {country for country, city in CAPITALS.items() if city in texts[country]} == CAPITALS.keys()
    for country, question in questions.items():
        assert texts[country] == generate(model, tokenizer, prompt_tokens(tokenizer, question, True), max_tokens=12)


@pytest.mark.long
@pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring backend")
def test_three_processes_share_nine_heads(smollm2_32k: Path, tmp_path: Path) -> None:
    """Three query heads and one key-value head for each; the first one prints."""
    command = [*MAIN, "generate", "--model", smollm2_32k, "--prompt", CAPITAL, "--max-tokens", 12]
    ends = start([command] * 3, tmp_path)
    assert [code for code, *_ in ends] == [0, 0, 0], ends
    assert "The capital of France is Paris" in ends[0][1] and ends[1][1] == ends[2][1] == ""


def test_the_server_answers_a_chat(smollm2_32k: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [*MAIN, "lm", "server", "--model", smollm2_32k, "--port", address.rpartition(":")[2]]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                ask(f"{address}/health")
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
        chat = {"messages": [{"role": "user", "content": CAPITAL}], "max_tokens": 12, "temperature": 0}
        answer = ask(f"{address}/v1/chat/completions", chat)
    finally:
        server.kill()
        server.wait()
    assert "The capital of France is Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == 37


def ask(address: str, body: Any = None) -> Any:
    """The JSON of an answer, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, None if body is None else json.dumps(body).encode(), timeout=120) as answer:
        return json.load(answer)
