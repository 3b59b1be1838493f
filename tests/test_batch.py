"""Many prompts at once: same answers as one at a time, resuming after a kill, and files that are refused."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_resonance import load, plan_memory, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation.batch import (
    Request,
    answer_requests,
    generate_batch,
    open_answers,
    read_requests,
    sequences,
)  # fmt: skip
from mlx_resonance.generation.beginnings import by_beginning
from mlx_resonance.generation.engine import Engine
from mlx_resonance.generation.prefill import LAYER_SECONDS, Pace
from mlx_resonance.generation.prompt_cache import PromptCache
from mlx_resonance.generation.sampling import Sampling
from mlx_resonance.run_log import json_lines

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator

from .checkpoints import COMMAND, FITTED_HERE, prompt, source

LENGTHS = (2, 3, 40, 700, 5, 130, 64, 1, 300, 17)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=4)


@pytest.fixture(scope="module")
def requests(loaded: Any) -> list[Request]:
    """Prompts of different lengths."""
    return [Request(f"p{i}", prompt(loaded[1], length, start=400 * i), f"text {i}") for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(loaded: Any, requests: list[Request]) -> dict[str | int, dict[str, Any]]:
    """What `stream_generate` answers to each prompt alone."""
    return alone(loaded, requests)


def alone(loaded: Any, requests: list[Request], **options: Any) -> dict[str | int, dict[str, Any]]:
    """The answer that `stream_generate` gives to each prompt on its own."""
    model, tokenizer = loaded
    answers = {}
    for request in requests:
        responses = list(stream_generate(model, tokenizer, request.tokens, **{"max_tokens": 20} | options))
        tokens = [response.token for response in responses]
        if responses[-1].finish_reason == "stop":
            tokens.pop()
        answers[request.id] = {
            "id": request.id,
            "text": tokenizer.decode(tokens),
            "prompt_tokens": len(request.tokens),
            "generation_tokens": len(tokens),
            "finish_reason": responses[-1].finish_reason,
        }
    return answers


def batched(loaded: Any, requests: list[Request], **options: Any) -> dict[str | int, dict[str, Any]]:
    """The answers of a batch."""
    answers = list(generate_batch(*loaded, requests, **{"max_tokens": 20} | options))
    assert len(answers) == len(requests)
    return {answer["id"]: answer for answer in answers}


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
@pytest.mark.parametrize("step", [2048, 50])
def test_answers_equal_those_of_one_at_a_time(
    loaded: Any, requests: list[Request], expected: dict[str, Any], batch_size: int, step: int
) -> None:
    assert batched(loaded, requests, batch_size=batch_size, prefill_step_size=step) == expected


@pytest.mark.parametrize("kv_bits", [pytest.param(8, marks=pytest.mark.long), 4])
def test_quantized_answers_equal_those_of_one_at_a_time(loaded: Any, requests: list[Request], kv_bits: int) -> None:
    wanted = alone(loaded, requests, kv_bits=kv_bits)
    assert batched(loaded, requests, kv_bits=kv_bits, batch_size=3, prefill_step_size=50) == wanted
    assert batched(loaded, requests, kv_bits=kv_bits) == wanted


class Recorder:
    """A model that notes the shapes (rows, tokens) of the chunks of prompts that it reads."""

    def __init__(self, model: Any) -> None:
        self._of, self.chunks, self.on_chunk = model, [], lambda rows, tokens: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __call__(self, inputs: mx.array, **options: Any) -> mx.array:
        if inputs.shape[1] > 1:
            self.chunks.append(inputs.shape)
            self.on_chunk(*inputs.shape)
        return self._of(inputs, **options)

    @property
    def read(self) -> int:
        """Tokens of all chunks, padding included."""
        return sum(rows * tokens for rows, tokens in self.chunks)


@pytest.mark.parametrize("speed", [120, 600])
def test_chunks_of_a_batch_are_sized_by_time(loaded: Any, speed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = Recorder(loaded[0]), loaded[1]
    requests = [Request(i, prompt(tokenizer, length, start=900 * i), "") for i, length in enumerate((900, 700, 200))]
    now = 0.0

    def launch(rows: int, tokens: int) -> None:
        nonlocal now
        now += len(model.layers) * LAYER_SECONDS * rows * tokens / speed  # a layer reads so many in its time

    model.on_chunk = launch
    monkeypatch.setattr("mlx_resonance.generation.rows.Pace", partial(Pace, gpu=True, clock=lambda: now))
    answers = batched((model, tokenizer), requests, batch_size=3)
    assert model.chunks[0] == (3, 256 // 3)  # a small one first
    assert all(rows * tokens < 1.2 * speed for rows, tokens in model.chunks[1:])
    assert (model.chunks[1][1] > 256 // 3) == (speed > 256)
    assert max(rows * tokens for rows, tokens in model.chunks[2:]) > 0.6 * speed
    assert answers == alone(loaded, requests)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_chunk_exceeds_the_step(loaded: Any, requests: list[Request], batch_size: int) -> None:
    model = Recorder(loaded[0])
    batched((model, loaded[1]), requests, batch_size=batch_size, prefill_step_size=64)
    assert max(tokens for _, tokens in model.chunks) == 64
    assert max(rows for rows, _ in model.chunks) <= batch_size


@pytest.fixture
def short_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that share 64 tokens share a KV cache, so that tests need no long ones."""
    for module in ("batch", "rows"):
        monkeypatch.setattr(f"mlx_resonance.generation.{module}.SHARED", 64)


@pytest.fixture(scope="module")
def questions(loaded: Any) -> list[Request]:
    """Two documents with a common preface, several questions about each, one twice, and a short prompt in between."""
    tokenizer = loaded[1]
    preface = prompt(tokenizer, 80)
    documents = [preface + prompt(tokenizer, length, start=3000 + length)[1:] for length in (161, 101)]
    texts = [documents[i % 2] + prompt(tokenizer, 9 + 3 * i, start=100 * i)[1:] for i in range(6)]
    texts = [*texts[:3], prompt(tokenizer, 40, start=50), *texts[3:], texts[2]]
    return [Request(i, tokens, f"text {i}") for i, tokens in enumerate(texts)]


ONCE = 80 + 160 + 100  # tokens of the preface and the documents


@pytest.mark.usefixtures("short_beginnings")
@pytest.mark.parametrize(("batch_size", "kv_bits"), [(1, None), (3, 8), (32, None)])
def test_a_beginning_that_prompts_share_is_read_once(
    loaded: Any, questions: list[Request], batch_size: int, kv_bits: int | None
) -> None:
    model = Recorder(loaded[0])
    answers = batched((model, loaded[1]), questions, batch_size=batch_size, kv_bits=kv_bits, max_tokens=8)
    assert answers == alone(loaded, questions, kv_bits=kv_bits, max_tokens=8)
    assert ONCE <= model.read < ONCE + 8 * 40


@pytest.mark.usefixtures("short_beginnings")
@pytest.mark.parametrize(("batch_size", "kv_bits"), [(1, None), (3, 8)])
def test_the_disk_cache_of_a_batch(
    loaded: Any, questions: list[Request], tmp_path: Path, batch_size: int, kv_bits: int | None
) -> None:
    options = {"batch_size": batch_size, "kv_bits": kv_bits, "max_tokens": 8}
    extra = Request("alone", prompt(loaded[1], 300, start=5000), "its beginning is its own")
    requests = [*questions, extra]
    wanted = batched(loaded, requests, **options)
    model = Recorder(loaded[0])
    first = batched((model, loaded[1]), requests, disk_cache=PromptCache(tmp_path, "a" * 16), **options)
    assert first == wanted and model.read >= ONCE + 299
    model.chunks.clear()
    again = batched((model, loaded[1]), requests, disk_cache=PromptCache(tmp_path, "a" * 16), **options)
    assert again == wanted and model.read < 9 * 40
    known = PromptCache(tmp_path, "a" * 16).known
    assert known(extra.tokens) == 299 and known(questions[0].tokens) >= 80 + 160
    model.chunks.clear()
    other = Request("other", questions[0].tokens[:238] + prompt(loaded[1], 20, start=77), "another question")
    [answer] = generate_batch(model, loaded[1], [other], disk_cache=PromptCache(tmp_path, "a" * 16), kv_bits=kv_bits)
    assert model.read < 30 and answer["prompt_tokens"] == 258


def test_prompts_are_inserted_only_when_there_is_room(
    loaded: Any, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = finished = most = 0

    class Counted(BatchGenerator):
        def insert(self, prompts: Any, *args: Any, **options: Any) -> Any:
            nonlocal started, most
            started += len(prompts)
            most = max(most, started - finished)
            return super().insert(prompts, *args, **options)

    monkeypatch.setattr("mlx_resonance.generation.rows.BatchGenerator", Counted)
    for _ in generate_batch(*loaded, requests, max_tokens=5, batch_size=3):
        finished += 1
    assert (started, finished, most) == (len(requests), len(requests), 3)


def test_the_order_that_reads_every_beginning_once() -> None:
    a, b, c = [1] * 6, [2] * 6, [3] * 6
    prompts = [[9], a + b + [5], c, a + c + [5], a + b + [6, 7], [4, 4], a + b + [5], a]
    assert by_beginning(prompts, 4) == [(0, 0), (7, 5), (1, 12), (6, 12), (4, 12), (3, 6), (2, 0), (5, 0)]
    assert by_beginning(prompts, 100) == [(i, 0) for i in range(len(prompts))]
    assert by_beginning([], 4) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stop_strings_end_answers(loaded: Any, requests: list[Request], expected: Any, batch_size: int) -> None:
    stop = ["\n#", "self", "zzz"]
    answers = batched(loaded, requests, stop=stop, batch_size=batch_size)
    stopped = 0
    for key, answer in answers.items():
        whole = expected[key]["text"]
        ends = [whole.find(word) for word in stop if word in whole]
        assert answer["text"] == whole[: min(ends, default=len(whole))]
        if ends:
            assert answer["finish_reason"] == "stop"
            stopped += answer["generation_tokens"] < expected[key]["generation_tokens"]
    assert stopped >= 2
    with pytest.raises(UsageError, match="empty"):
        batched(loaded, requests, stop=[""])


def test_sampling_options_of_a_batch(loaded: Any, requests: list[Request], expected: Any) -> None:
    requests = requests[:3] + requests[4:6]
    expected = {request.id: expected[request.id] for request in requests}
    penalty = Sampling(repetition_penalty=1.3)
    answers = batched(loaded, requests, sampling=penalty, batch_size=3)
    engine = Engine(*loaded)
    for request in requests:
        responses = list(engine.stream(request.tokens, 20, sampling=penalty))
        tokens = [response.token for response in responses if response.finish_reason != "stop"]
        assert answers[request.id]["text"] == loaded[1].decode(tokens)
    assert answers != expected
    assert batched(loaded, requests, sampling=Sampling(temp=2.0, top_k=1)) == expected
    hot = [batched(loaded, requests, sampling=Sampling(temp=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2] and hot[0] == batched(loaded, requests, temp=1.0, seed=1)
    with pytest.raises(UsageError, match="top_k"):
        batched(loaded, requests, sampling=Sampling(top_k=10**6))


def test_an_answer_keeps_its_first_space(loaded: Any) -> None:
    tokens = loaded[1].encode("import os\nfrom pathlib", add_special_tokens=True)
    [answer] = batched(loaded, [Request(1, tokens, "")], max_tokens=2).values()
    assert answer["text"].startswith(" import")


def answers_of(path: Path) -> list[Any]:
    """The lines of a run log after its header."""
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


SETTINGS = {"digest": "0123", "temp": 0.0}


def answer(loaded: Any, requests: list[Request], output: Path, **settings: Any) -> int:
    """Answer what the file has no answer to. Returns the number of new answers."""
    log, done = open_answers(output, requests, SETTINGS | settings, "a model")
    missing = [request for request in requests if request.id not in done]
    answer_requests(log, *loaded, missing, max_tokens=20)
    return len(missing)


def without_prompts(path: Path) -> dict[str, Any]:
    lines = answers_of(path)
    return {line["id"]: {k: v for k, v in line.items() if k not in ("prompt", "prompt_digest")} for line in lines}


def test_finished_ids_are_skipped_and_half_a_line_is_dropped(
    loaded: Any, requests: list[Request], expected: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert answer(loaded, requests[:3], output) == 3
    assert without_prompts(output) == {f"p{i}": expected[f"p{i}"] for i in range(3)}
    before = output.read_bytes()
    with output.open("ab") as file:
        file.write('{"id": "p4", "text": "hälf'.encode()[:-3])
    assert answer(loaded, requests, output) == len(requests) - 3
    assert output.read_bytes().startswith(before)
    assert without_prompts(output) == expected and len(answers_of(output)) == len(expected)
    assert answer(loaded, requests, output) == 0


def test_two_processes_leave_one_answer_each(loaded: Any, requests: list[Request], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    log, _ = open_answers(output, requests, SETTINGS, "a model")
    answer(loaded, requests[:2], output)  # by another process, meanwhile
    before = output.read_bytes()
    answer_requests(log, *loaded, requests[:2], max_tokens=20)
    assert output.read_bytes() == before


def test_another_prompt_or_setting_is_refused_with_both_values(
    loaded: Any, requests: list[Request], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    answer(loaded, requests[:2], output)
    before = output.read_bytes()
    other = replace(requests[1], prompt="another text")
    with pytest.raises(UsageError, match='another result for id \'p1\': prompt is "text 1" there and "another text"'):
        answer(loaded, [requests[0], other], output)
    far = [replace(requests[1], prompt="x" * 100 + end) for end in "ab"]  # they differ beyond the part that is shown
    answer(loaded, [replace(far[0], id="far")], output)
    with pytest.raises(UsageError, match="prompt_digest is"):
        answer(loaded, [replace(far[1], id="far")], output)
    with pytest.raises(UsageError, match=r"temp is 0\.0 there and 0\.7 here"):
        answer(loaded, requests[:2], output, temp=0.7)
    assert output.read_bytes().startswith(before)


def test_the_command(checkpoint: Path, tmp_path: Path, run: Any, loaded: Any) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = {1: "import os\n", "1": "def main():\n", "ü": "class A:\n"}
    prompts.write_text("\n".join(json.dumps({"id": key, "prompt": text}) for key, text in texts.items()) + "\n\n")
    common = ["generate", "--model", checkpoint, "--max-tokens", 8, "--json"]
    code, out, err = run(*common, "--prompts-file", prompts, "--output", output)
    assert code == 0, err
    assert json.loads(out) == {"output": str(output), "answers": 3, "new": 3}
    answers = {answer["id"]: answer["text"] for answer in answers_of(output)}
    assert answers.keys() == texts.keys()
    for key, text in texts.items():
        assert json.loads(run(*common, "--prompt", text)[1])["text"] == answers[key]
    code, out, _ = run(*common, "--prompts-file", prompts, "--output", output)
    assert code == 0 and json.loads(out)["new"] == 0 and len(answers_of(output)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "line 2: the id 1 is given twice"),
        ('{"id": 1, "prompt": "a"}\n{"id": 2, "prom', "line 2 is not JSON"),
        ("[1]\n", 'line 1: expected {"id": …, "prompt": "…"}'),
        ('{"id": 1}\n', "line 1: expected"),
        ('{"id": null, "prompt": "a"}\n', "line 1: expected"),
        ('{"id": true, "prompt": "a"}\n', "line 1: expected"),
        ('{"id": 1, "prompt": ["a"]}\n', "line 1: expected"),
        ('{"id": 1, "prompt": "  "}\n', "line 1: .*the prompt is empty"),
        ("\xff\xfe\n", "line 1 is not UTF-8"),
        ("\n\n", "has no prompts"),
        ("", "has no prompts"),
    ],
)
def test_a_wrong_prompts_file_is_refused_in_one_line(
    random_llama: Path, tmp_path: Path, run: Any, content: str, message: str
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content.encode("latin-1" if "\xff" in content else "utf-8"))
    options = ["--prompts-file", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl", "--max-tokens", 4]
    code, out, err = run("generate", "--model", random_llama, *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        read_requests(tmp_path / "prompts.jsonl", load(random_llama)[1])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("content", ["my diary\n", '{"a": 1}\n', "[1]\n", '{"id": [1], "text": ""}\n', "no newline"])
def test_a_foreign_output_is_refused_and_left_as_it_is(
    random_llama: Path, tmp_path: Path, run: Any, content: str
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"id": 1, "prompt": "a"}\n')
    output.write_text(content)
    options = ["--prompts-file", prompts, "--output", output, "--max-tokens", 4]
    code, out, err = run("generate", "--model", random_llama, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and "give another --output" in err
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts-file", "p.jsonl"], "give --output"),
        (["--output", "o.jsonl"], "give --prompts-file"),
        (["--prompts-file", "p.jsonl", "--output", "o.jsonl", "--prompt", "a"], "not both"),
        (
            ["--prompts-file", "missing.jsonl", "--output", "o.jsonl"],
            "no such file of prompts (--prompts-file)",
        ),
    ],
)
def test_options_that_do_not_go_together(
    random_llama: Path, tmp_path: Path, run: Any, options: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    code, out, err = run("generate", "--model", random_llama, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and message in err


@pytest.mark.long
def test_killed_half_way_and_run_again(checkpoint: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    pieces = [source()[300 * i : 300 * i + 20 + i] for i in range(60)]
    prompts.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(pieces)))
    command = [*COMMAND, "--model", checkpoint, "--prompts-file", prompts, "--output", output, "--max-tokens", "24"]
    kills = 0
    for wanted in (1, 30):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < wanted):
            assert time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    assert kills < 2 or output.read_bytes().count(b"\n") <= len(pieces)
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(answer["id"] for answer in answers_of(output)) == list(range(len(pieces)))
    whole = tmp_path / "whole.jsonl"
    again = [whole if part == output else part for part in command]
    subprocess.run(again, check=True, capture_output=True)
    assert {a["id"]: a["text"] for a in answers_of(whole)} == {a["id"]: a["text"] for a in answers_of(output)}


@pytest.mark.parametrize(("count", "length"), [(16, 300), pytest.param(4, 1500, marks=pytest.mark.long)])
def test_the_plan_counts_the_whole_batch(checkpoint: Path, loaded: Any, count: int, length: int) -> None:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    prompts = [Request(i, [5 + i] * length, "") for i in range(count)]
    list(generate_batch(*loaded, prompts, max_tokens=8))
    plan = plan_memory(checkpoint, length + 8, sequences=count)
    # mlx-lm's batch caches grow by copying and by extension, so the plan is less exact than for a single prompt.
    found = mx.get_peak_memory() - before
    assert plan.kv < found  # both exact
    assert not FITTED_HERE or plan.total - plan.weights == pytest.approx(found, rel=0.2)


def test_a_batch_that_does_not_fit_is_refused_with_a_size_that_does(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "prompt": f"import os  # {i}\n" * 30}) for i in range(32)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    arguments = ("generate", "--model", checkpoint, "--prompts-file", tmp_path / "prompts.jsonl", "--max-tokens", 2)
    arguments = (*arguments, "--output", tmp_path / "out.jsonl", "--memory", "3.27GB")
    code, stdout, stderr = run(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    advice = re.search(r"--batch-size (\d+)", stderr)
    assert advice is not None and 1 <= int(advice[1]) < 32 and not (tmp_path / "out.jsonl").exists()
    assert run(*arguments, "--batch-size", advice[1])[0] == 0
    assert len(answers_of(tmp_path / "out.jsonl")) == 32
    assert run(*arguments, "--batch-size", 0)[0] == 2


DEEP = "[" * 200_000 + "\n"


@pytest.mark.parametrize("which", ["prompts", "output"])
def test_lines_nested_too_deep(random_llama: Path, tmp_path: Path, run: Any, which: str) -> None:
    contents = {"prompts": '{"id": 1, "prompt": "a"}\n', "output": ""} | {which: DEEP}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    files = ("--prompts-file", tmp_path / "prompts", "--output", tmp_path / "output")
    code, out, err = run("generate", "--model", random_llama, *files, "--max-tokens", 4)
    assert (code, out, err.count("\n")) == (2, "", 1) and which in err and "line 1" in err
    assert {name: (tmp_path / name).read_text() for name in contents} == contents


def test_an_answer_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "output").write_text('{"generate": 1, "digest": "0123", "temp": 0.0}\n{"id": 1}\n')
    with pytest.raises(UsageError, match="line 2 has no 'prompt'"):
        open_answers(tmp_path / "output", [], SETTINGS, "a model")


def test_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf[1]\r\n\n{}")
    assert list(json_lines(tmp_path / "lines")) == [(1, [1]), (3, {})]


def test_an_answer_keeps_its_first_space_on_every_way(checkpoint: Path, run: Any, tmp_path: Path) -> None:
    """What continues a prompt begins with a space, and a stop string may begin with it."""
    text = "import os\nclass"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": 0, "prompt": text}) + "\n")
    for stop in ((), ("--stop", " ")):
        options = ("--max-tokens", 6, *stop)
        single = json.loads(run("generate", "-m", checkpoint, "-p", text, "--json", *options)[1])
        output = tmp_path / f"answers{len(stop)}.jsonl"
        files = ("--prompts-file", tmp_path / "prompts.jsonl", "--output", output)
        assert run("generate", "-m", checkpoint, *files, *options)[0] == 0
        (answer,) = answers_of(output)
        assert answer["text"] == single["text"] and answer["finish_reason"] == single["finish_reason"]
        assert single["text"] == "" if stop else single["text"].startswith(" ")


def test_a_shared_beginning_is_one_more_sequence() -> None:
    long = list(range(600))
    assert [sequences(prompts, 8) for prompts in ([[1]], [[1], [2]], [[*long, 1], [*long, 2]])] == [1, 2, 3]
    assert sequences([[*long, i] for i in range(40)], 8) == 9 and sequences([], 8) == 1
