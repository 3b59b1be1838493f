"""Many prompts at once: the answers of one at a time, resumed after a kill, and files that are refused."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_resonance import load, plan_memory, stream_generate
from mlx_resonance.generation.batch import Request, answer_file, generate_batch, read_requests
from mlx_resonance.records import json_lines

import mlx.core as mx
import pytest

from .checkpoints import COMMAND, prompt, source

LENGTHS = (2, 3, 40, 700, 5, 130, 64, 1, 300, 17)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=4)


@pytest.fixture(scope="module")
def requests(loaded: Any) -> list[Request]:
    """Prompts of different lengths."""
    return [Request(f"p{i}", prompt(loaded[1], length, start=400 * i)) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(loaded: Any, requests: list[Request]) -> dict[str | int, dict[str, Any]]:
    """What `stream_generate` answers to each alone."""
    model, tokenizer = loaded
    answers = {}
    for request in requests:
        responses = list(stream_generate(model, tokenizer, request.tokens, max_tokens=20))
        tokens = [response.token for response in responses]
        stopped = responses[-1].finish_reason == "stop"
        answers[request.id] = {
            "id": request.id,
            "text": tokenizer.decode(tokens[:-1] if stopped else tokens),
            "prompt_tokens": len(request.tokens),
            "generation_tokens": len(tokens) - stopped,
            "finish_reason": responses[-1].finish_reason,
        }
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
@pytest.mark.parametrize("step", [2048, 50])
def test_the_answers_of_one_at_a_time(
    loaded: Any, requests: list[Request], expected: dict[str, Any], batch_size: int, step: int
) -> None:
    answers = list(generate_batch(*loaded, requests, max_tokens=20, batch_size=batch_size, prefill_step_size=step))
    assert len(answers) == len(requests)
    assert {answer["id"]: answer for answer in answers} == expected


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_finished_ids_are_skipped_and_half_a_line_is_dropped(
    loaded: Any, requests: list[Request], expected: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert answer_file(*loaded, requests[:3], output, max_tokens=20) == 3
    assert {answer["id"]: answer for answer in lines(output)} == {f"p{i}": expected[f"p{i}"] for i in range(3)}
    before = output.read_bytes()
    with output.open("ab") as file:
        file.write('{"id": "p4", "text": "hälf'.encode()[:-3])
    seen: list[tuple[int, int]] = []
    new = answer_file(*loaded, requests, output, lambda *at: seen.append(at), max_tokens=20)
    assert new == len(requests) - 3 and seen == [(i, len(requests)) for i in range(3, len(requests) + 1)]
    assert output.read_bytes().startswith(before)
    assert {answer["id"]: answer for answer in lines(output)} == expected and len(lines(output)) == len(expected)
    assert answer_file(*loaded, requests, output, max_tokens=20) == 0


def test_the_command(checkpoint: Path, tmp_path: Path, run: Any, loaded: Any) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = {1: "import os\n", "1": "def main():\n", "ü": "class A:\n"}
    prompts.write_text("\n".join(json.dumps({"id": key, "prompt": text}) for key, text in texts.items()) + "\n\n")
    common = ["generate", "--model", checkpoint, "--max-tokens", 8, "--json"]
    code, out, err = run(*common, "--prompts-file", prompts, "--output", output)
    assert code == 0, err
    assert json.loads(out) == {"output": str(output), "answers": 3, "new": 3}
    answers = {answer["id"]: answer["text"] for answer in lines(output)}
    assert answers.keys() == texts.keys()
    for key, text in texts.items():
        assert json.loads(run(*common, "--prompt", text)[1])["text"] == answers[key]
    code, out, _ = run(*common, "--prompts-file", prompts, "--output", output)
    assert code == 0 and json.loads(out)["new"] == 0 and len(lines(output)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "line 2: the id 1 stands twice"),
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
    assert (code, out, err.count("\n")) == (2, "", 1) and "choose another --output" in err
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts-file", "p.jsonl"], "go together"),
        (["--output", "o.jsonl"], "go together"),
        (["--prompts-file", "p.jsonl", "--output", "o.jsonl", "--prompt", "a"], "not both"),
        (["--prompts-file", "p.jsonl", "--output", "o.jsonl", "--kv-bits", 8], "goes with neither"),
        (["--prompts-file", "missing.jsonl", "--output", "o.jsonl"], "no prompts file"),
    ],
)
def test_options_that_do_not_go_together(
    random_llama: Path, tmp_path: Path, run: Any, options: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    code, out, err = run("generate", "--model", random_llama, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: [generate] ") and message in err


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
    done = len(lines(output)) if output.read_bytes().endswith(b"\n") else None
    assert kills < 2 or done is None or done < len(pieces)
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(answer["id"] for answer in lines(output)) == list(range(len(pieces)))
    whole = tmp_path / "whole.jsonl"
    again = [whole if part == output else part for part in command]
    subprocess.run(again, check=True, capture_output=True)
    assert {a["id"]: a["text"] for a in lines(whole)} == {a["id"]: a["text"] for a in lines(output)}


@pytest.mark.parametrize(("count", "length"), [(16, 300), (4, 1500)])
def test_the_plan_counts_the_whole_batch(checkpoint: Path, loaded: Any, count: int, length: int) -> None:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    prompts = [Request(i, [5 + i] * length) for i in range(count)]
    list(generate_batch(*loaded, prompts, max_tokens=8))
    planned = plan_memory(checkpoint, length + 8, sequences=count).total
    # mlx-lm's caches of a batch grow by copying, and are extended: less exact than ours.
    assert planned == pytest.approx(mx.get_peak_memory(), rel=0.2)


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
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 32
    assert run(*arguments, "--batch-size", 0)[0] == 2


DEEP = "[" * 200_000 + "\n"


@pytest.mark.parametrize("which", ["prompts", "output"])
def test_lines_nested_too_deep(random_llama: Path, tmp_path: Path, run: Any, which: str) -> None:
    contents = {"prompts": '{"id": 1, "prompt": "a"}\n', "output": ""} | {which: DEEP}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    files = ("--prompts-file", tmp_path / "prompts", "--output", tmp_path / "output")
    code, out, err = run("generate", "--model", random_llama, *files, "--max-tokens", 4)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{which}, line 1 is no" in err
    assert {name: (tmp_path / name).read_text() for name in contents} == contents


def test_an_answer_without_text_is_refused_without_assertions_too(tmp_path: Path) -> None:
    (tmp_path / "output").write_text('{"id": 1}\n')
    code = "import pathlib, sys, mlx_resonance.generation.batch as batch; batch.finished_ids(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-O", "-c", code, tmp_path / "output"], capture_output=True, text=True)
    assert done.returncode == 1 and "line 1 is no answer" in done.stderr


def test_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf[1]\r\n\n{}")
    assert list(json_lines("kind", tmp_path / "lines")) == [(1, [1]), (3, {})]
