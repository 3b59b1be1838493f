"""L-Eval: prompts cut to a context, and answers from which a killed run resumes."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import storage
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation import answers, leval
from mlx_resonance.evaluation.answers import summarize
from mlx_resonance.evaluation.prompts import Limits, Prompt, cut, fit
from mlx_resonance.files import read_config
from mlx_resonance.tokenizer import load_tokenizer

import pytest

LEVAL = {"input": "A long text. " * 5, "instructions": ["Q1\nA. x", "Q2"], "outputs": ["A", "B"], "evaluation": "exam"}


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_leval_prompts(tmp_path: Path) -> None:
    one, two = leval.make_prompts([write(tmp_path / "coursera.jsonl", LEVAL)])
    text = one.before + one.document + one.after + one.start
    assert text.startswith("Now you are given a very long document. Please follow the instruction based on this")
    assert text.endswith(
        f"(like A or AB) when answering. \n\nDocument is as follows. {LEVAL['input']} \nQuestion: Q1\nA. x.  Please "
        "directly give the answer without any additional output or explanation \nAnswer:"
    )
    assert (one.id, two.id, one.budget, one.saved) == ("1.1", "1.2", 512, {"metric": "exam", "reference": "A"})
    (code, _) = leval.make_prompts([write(tmp_path / "codeU.jsonl", LEVAL)])
    assert code.keep_end and code.after == "\n\nQ1\nA. x" and code.start == ""
    summary = {**LEVAL, "evaluation": "rouge", "outputs": ["three more words", "one"]}
    (prompt, _) = leval.make_prompts([write(tmp_path / "news_summ.jsonl", summary)], max_tokens=7)
    assert prompt.after == " Instruction: Q1\nA. x \nAnswer this question with 3 words." and prompt.budget == 7


def test_a_story_is_asked_about_twice(tmp_path: Path) -> None:
    question = "Do we travel? Answer this question based on the world described in the document."
    entry = {**LEVAL, "instructions": [question], "outputs": ["True [fact: False]"]}
    story, fact = leval.make_prompts([write(tmp_path / "sci_fi.jsonl", entry)])
    assert (story.saved["reference"], fact.saved["reference"]) == ("True", "False") and fact.document == ""
    assert "real-world knowledge and facts up until your last training" in fact.before
    lines = [prompt.saved | {"task": "sci_fi", "max_tokens": 9, "truncated": False} for prompt in (story, fact)]
    said = [lines[0] | {"prediction": "true"}, lines[1] | {"prediction": "true"}]
    (row,) = leval.summary(said)
    assert (row["score"], row["scores"]) == (50, {"loyalty": 100, "fact": 0})


def test_leval_scores() -> None:
    line = {"task": "news_summ", "metric": "rouge", "reference": "the cat ran away", "max_tokens": 9, "truncated": True}
    (row,) = leval.summary([line | {"prediction": "the cat sat"}])
    # 4/7, 2/5 and 4/7 of test_scorers, and their geometric mean
    assert row["scores"] == {"rouge1": 57.14, "rouge2": 40.0, "rougeL": 57.14} and row["score"] == 50.74
    assert (row["n"], row["truncated"], row["max_tokens"]) == (1, 1, 9)
    topic = {"task": "topic_retrieval_longchat", "metric": "exam", "max_tokens": 9, "truncated": False}
    said = [("first", "art", "Art"), ("second", "art", "sports"), ("first", "art", "x"), ("third", "art", "art")]
    lines = [topic | {"part": part, "reference": right, "prediction": text} for part, right, text in said]
    assert leval.summary(lines)[0]["score"] == 50  # the mean of 50, 0 and 100


def test_truncation(tokenizer: Any) -> None:
    words = [f"word{i}" for i in range(600)]
    text = " ".join(words)
    count = len(tokenizer.encode(text, add_special_tokens=False))
    # As many words as tokens, reduced by 250 at a time.
    assert cut(tokenizer, text, 1250, "words").split(" ") == words[:250]
    assert cut(tokenizer, text, 1250, "words", keep_end=True).split(" ") == words[-250:]
    assert cut(tokenizer, text, count, "head") == text
    head, tail = cut(tokenizer, text, 50, "head"), cut(tokenizer, text, 50, "words", keep_end=True)
    assert text.startswith(head) and text.endswith(tail) and len(tokenizer.encode(head)) in range(45, 52)
    prompt = Prompt("t", "1", "Begin: ", text, " End?", 20, {})
    for truncation in ("words", "head"):
        ids, truncated = fit(tokenizer, prompt, Limits(1000, truncation))
        assert truncated and len(ids) <= 980 and (len(ids) > 900 or truncation == "words")
        found = tokenizer.decode(ids, skip_special_tokens=True)
        assert found.startswith("Begin: word0 ") and found.endswith(" End?")
        assert "word599" not in found
    ids, truncated = fit(tokenizer, prompt, Limits(count + 60, "head"))
    assert not truncated and tokenizer.decode(ids, skip_special_tokens=True) == "Begin: " + text + " End?"
    with pytest.raises(UsageError, match="t, 1: the question and 20 tokens of answer take"):
        fit(tokenizer, prompt, Limits(22))


def test_chat_template(stdlib_llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stdlib_llama / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    chat = load_tokenizer(tmp_path, read_config(tmp_path))
    prompt = Prompt("t", "1", "Who", " is", " it?", 20, {}, start=" It is")
    plain = chat.encode("Who is it? It is")
    assert prompt.tokens(chat, "Who is it?", False) == prompt.tokens(tokenizer, "Who is it?", True) == plain
    ids = prompt.tokens(chat, "Who is it?", True)
    assert ids == [*chat.encode("Who is it?"), *chat.encode(" It is", add_special_tokens=False)]


def test_summarize() -> None:
    common = {"task": "a", "metric": "m", "max_tokens": 1, "truncated": False}
    rows = summarize(
        [common | {"x": 0}, common | {"task": "b", "x": 1}, common | {"x": 1}], lambda line: {"x": line["x"]}
    )
    assert [(row["task"], row["n"], row["score"]) for row in rows] == [("a", 2, 50), ("b", 1, 100)]


def files(folder: Path) -> list[Any]:
    more = {**LEVAL, "input": "def f(x):\n    return x\n" * 30}
    paths = write(folder / "coursera.jsonl", LEVAL), write(folder / "codeU.jsonl", more)
    return [part for path in paths for part in ("--data", path)]


def test_commands(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", checkpoint, "--context", 256, "--max-tokens", 2, "--output"]
    code, out, _ = run("eval", "leval", *arguments, tmp_path / "a.jsonl", *files(tmp_path), "--json")
    result = json.loads(out)
    about = ("context", "truncation", "chat_template")
    assert [result[name] for name in about] == [256, "words", False] and result["version"]["mlx-lm"]
    assert code == 0 and result["answers"] == 4 and result["rope"] and result["model"] == str(checkpoint)
    assert [(row["task"], row["n"], row["truncated"]) for row in result["results"]] == [
        ("coursera", 2, 0), ("codeU", 2, 2)
    ]  # fmt: skip
    code, out, _ = run("eval", "leval", *arguments, tmp_path / "b.jsonl", *files(tmp_path), "--limit", 1)
    assert code == 0 and "coursera (exam)" in out and "mean" in out
    kept = {json.loads(line).get("id") for line in (tmp_path / "b.jsonl").read_text().splitlines()}
    assert kept == {None, "1.1"}
    code, _, err = run("eval", "longbench", "--data", "qasper.jsonl")
    assert code == 2 and err == "error: eval longbench is now: mlx-resonance eval harness --suite longbench\n"


def test_killed_and_resumed(run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, data = tmp_path / "answers.jsonl", files(tmp_path)
    arguments = ["eval", "leval", "--model", checkpoint, *data, "--max-tokens", 2, "--output", output]
    arguments.extend(["--context", 256])
    assert run(*arguments)[0] == 0
    whole, asked = output.read_bytes(), []
    greedy = answers.greedy

    def counted(*given: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return greedy(*given, **options)

    monkeypatch.setattr(answers, "greedy", counted)
    output.unlink()
    assert run(*arguments)[0] == 130 and len(output.read_text().splitlines()) == 1 + 2
    with output.open("ab") as file:
        file.write(b'{"task": "cod')  # half a line
    assert run(*arguments)[0] == 0 and len(asked) == 3 + 2 and output.read_bytes() == whole
    assert run(*arguments)[0] == 0 and len(asked) == 3 + 2 and output.read_bytes() == whole
    code, _, err = run(*arguments, "--context", 300)
    assert code == 2 and "other settings: context is 256 there and 300 here" in err and "another --output" in err
    write(tmp_path / "coursera.jsonl", {**LEVAL, "input": "Another text"})
    code, _, err = run(*arguments)
    assert code == 2 and re.search("for task 'coursera', id '1.1': digest is \"\\w+\" there and \"\\w+\" here", err)
    assert len(err.splitlines()) == 1
    write(tmp_path / "coursera.jsonl", {**LEVAL, "outputs": ["B", "B"]})
    code, _, err = run(*arguments)
    assert code == 2 and "for task 'coursera', id '1.1': reference is \"A\" there and \"B\" here" in err
    assert output.read_bytes() == whole


def test_full_disk(run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, data = tmp_path / "answers.jsonl", files(tmp_path)
    arguments = ["eval", "leval", "--model", checkpoint, *data, "--max-tokens", 2, "--output", output]
    assert run(*arguments, "--limit", 1)[0] == 0
    before = output.read_bytes()

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", fsync)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "") and err.splitlines()[-1] == (
        f"error: {output} cannot be written (No space left on device): the same command resumes from here"
    )
    assert output.read_bytes() == before


BAD = {
    "leval coursera.jsonl ": "coursera.jsonl is empty",
    'leval coursera.jsonl {"input": 1': "coursera.jsonl, line 1 is not JSON",
    "leval coursera.jsonl [1]": "coursera.jsonl, line 1 is not a JSON object",
    "leval coursera.jsonl \n\n{}": "coursera.jsonl, line 3 has no 'input' that is a string",
    'leval coursera.jsonl {"input": "a", "instructions": []}': "line 1 has no 'instructions' that is a list of strings",
    "leval poems.jsonl {}": "poems.jsonl must be named after its task, one of coursera, quality",
    f"leval coursera.jsonl {json.dumps({**LEVAL, 'outputs': ['A']})}": "line 1 has 2 instructions and 1 outputs",
    f"leval coursera.jsonl {json.dumps({**LEVAL, 'evaluation': 'f1'})}": "line 1: coursera has no evaluation 'f1'",
    'leval qasper.jsonl {"input": "a", "context": "b", "answers": ["c"], "dataset": "qasper"}': (
        "qasper.jsonl is a file of LongBench, whose tasks mlx-resonance eval harness --suite longbench runs (--data)"
    ),
    'leval vt.jsonl {"index": 0, "input": "a", "outputs": ["b"], "length": 60}': (
        "vt.jsonl is a file of RULER, whose tasks mlx-resonance eval harness --suite ruler runs (--data)"
    ),
    f"leval news_summ.jsonl {json.dumps({**LEVAL, 'evaluation': 'LLM'})}": "no question is left",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(run: Any, checkpoint: Path, tmp_path: Path, case: str) -> None:
    kind, name, content = case.split(" ", 2)
    (tmp_path / name).write_text(content)
    output = tmp_path / "answers.jsonl"
    code, out, err = run("eval", kind, "--model", checkpoint, "--data", tmp_path / name, "--output", output)
    assert (code, out) == (2, "") and BAD[case] in err and len(err.splitlines()) == 1 and not output.exists()


OPTIONS = {
    "--context 513": "513 tokens exceed the checkpoint's context of 512 tokens: give --factor 2",
    "--context 40": "give another --context or another --max-tokens",
    "--max-tokens 0": "Invalid value for '--max-tokens'",
    "--limit 0": "Invalid value for '--limit'",
    "--truncation tail": "'tail' is not one of 'words', 'head'",
    "--data none.jsonl": "none.jsonl",
    "--data coursera.jsonl": "are of the same task",
}


@pytest.mark.parametrize("arguments", OPTIONS)
def test_bad_options(
    run: Any, checkpoint: Path, tmp_path: Path, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(Path("coursera.jsonl"), LEVAL)
    code, out, err = run(
        "eval", "leval", "--model", checkpoint, "--data", data, "--output", "out.jsonl", *arguments.split()
    )
    assert (code, out) == (2, "") and OPTIONS[arguments] in err and len(err.splitlines()) == 1
    assert not Path("out.jsonl").exists()


def test_output_of_something_else(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path / "coursera.jsonl", LEVAL), write(tmp_path / "notes.jsonl", {"a": 1})
    arguments = ["eval", "leval", "--model", checkpoint, "--data", data, "--max-tokens", 2, "--output"]
    code, _, err = run(*arguments, output)
    assert code == 2 and "notes.jsonl is not a run log of leval results" in err
    good = tmp_path / "good.jsonl"
    assert run(*arguments, good)[0] == 0
    header = good.read_text().splitlines()[0]
    good.write_text(header + '\n{"task": "coursera"}\n')
    code, _, err = run(*arguments, good)
    assert code == 2 and "good.jsonl, line 2 has no 'id' that is a string" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": ["coursera"]}, "line 2 has no 'task' that is a string"),
        ({"prediction": 5}, "line 2 has no 'prediction' that is a string"),
        ({"metric": "x"}, 'metric is "x" there and "exam" here'),
    ],
)
def test_output_with_a_wrong_line(
    run: Any, checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data, output = write(tmp_path / "coursera.jsonl", LEVAL), tmp_path / "answers.jsonl"
    arguments = ["eval", "leval", "--model", checkpoint, "--data", data, "--max-tokens", 2, "--output", output]
    assert run(*arguments, "--limit", 1)[0] == 0
    header, line = output.read_text().splitlines()
    write(output, json.loads(header), json.loads(line) | change)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
