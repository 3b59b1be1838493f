"""RULER's tasks: examples whose answers are in them, as long as the length allows, the same from the same seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_resonance.evaluation.prompts import Prompt
from mlx_resonance.evaluation.ruler import TASKS
from mlx_resonance.evaluation.ruler_runs import RulerGrid, largest, make_prompt, make_prompts
from mlx_resonance.evaluation.word_lists import ADJECTIVES, NOUNS, VERBS

import pytest

COUNTS = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}  # else 1 answer


def make(tokenizer: Any, task: str, length: int = 2048, index: int = 0, **options: Any) -> Prompt:
    return make_prompt(tokenizer, RulerGrid((task,), (length,), **options), task, length, index)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1100, 4096])
def test_length_is_kept_and_used(tokenizer: Any, task: str, length: int) -> None:
    for index in range(2):
        prompt = make(tokenizer, task, length, index)
        tokens = len(tokenizer.encode(prompt.before + prompt.start)) + TASKS[task].budget
        assert 0.9 * length < tokens <= length
        assert prompt.budget == TASKS[task].budget
        assert len(prompt.saved["references"]) == COUNTS.get(task, 1)


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_seed_task_length_and_number_alone(tokenizer: Any, task: str) -> None:
    one = make(tokenizer, task, 1100, 1)
    assert make(tokenizer, task, 1100, 1, samples=3) == one
    others = [make(tokenizer, task, 1100, 0), make(tokenizer, task, 1100, 1, seed=1), make(tokenizer, task, 1200, 1)]
    assert all(other.saved["references"] != one.saved["references"] for other in others)


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_needles_are_where_the_question_finds_them(tokenizer: Any, task: str) -> None:
    prompt = make(tokenizer, task)
    needles = dict[str, list[str]]()
    for key, value in re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", prompt.before):
        needles.setdefault(key, []).append(value)
    asked = re.search(r"special magic \w+ for (.*) mentioned in the provided text\?$", prompt.before)[1]
    keys = re.split(", and |, ", asked)
    assert sorted(value for key in keys for value in needles[key]) == sorted(prompt.saved["references"])
    assert len(needles) == {"niah_multikey_1": 4, "niah_multiquery": 4}.get(task, len(needles))
    assert (len(needles) > 15) == (task in ("niah_multikey_2", "niah_multikey_3"))  # a haystack of needles
    assert prompt.start.endswith(" is" if len(prompt.saved["references"]) == 1 else " are")


def test_variables_get_the_value_from_each_other(tokenizer: Any) -> None:
    prompt = make(tokenizer, "vt")
    assert prompt.before.count("Memorize and track") == 2  # the first one is solved
    asked = prompt.before.rpartition("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+)", asked)[1]
    names = [re.search(rf"VAR (\w+) = {value}\n", asked)[1]]
    while found := re.search(rf"VAR (\w+) = VAR {names[-1]} ", asked):
        assert found.start() > asked.index(f"VAR {names[-1]} =")  # in this order
        names.append(found[1])
    assert names == prompt.saved["references"] and f" 5 variables are assigned the value {value}" in prompt.start


def test_common_words_are_the_ten_most_frequent(tokenizer: Any) -> None:
    asked = make(tokenizer, "cwe").before.rpartition("Below is")[2].partition("Question")[0]
    counts = Counter(re.findall(r"\d+\. (\w+)", asked))
    common = [word for word, count in counts.most_common(10) if count == 6]
    assert sorted(common) == sorted(make(tokenizer, "cwe").saved["references"])
    assert set(counts.values()) == {1, 6}


@pytest.mark.parametrize("length", [400, 1000, 3000])
def test_frequent_words_are_the_three_after_the_dots(tokenizer: Any, length: int) -> None:
    prompt = make(tokenizer, "fwe", length)
    words = Counter(prompt.before.partition("coded words. ")[2].partition("\nQuestion")[0].split())
    (dots, _), *first, (_, fourth) = words.most_common(5)
    assert dots == "..." and [word for word, _ in first] == prompt.saved["references"] and first[-1][1] > fourth


def test_no_word_is_a_part_of_another() -> None:
    words = [*NOUNS, *ADJECTIVES, *VERBS]
    assert len(set(words)) == len(words) > 500
    text = " ".join(words)
    assert all(text.count(word) == 1 for word in words)


@pytest.mark.parametrize("limit", [30, 31, 1000, 123456])
def test_largest_in_few_tries(limit: int) -> None:
    tried = []

    def tokens(size: int) -> int:
        tried.append(size)
        return 10 + 7 * size + size % 3

    size = largest(tokens, limit, 1)
    assert 10 + 7 * size + size % 3 <= limit < 10 + 7 * (size + 2) and len(tried) <= 9
    assert largest(lambda size: size * size, 999, 1) == 31  # however uneven
    assert largest(lambda size: 10 + 7 * size, 17, 1) == 1


def test_own_essay(tokenizer: Any, tmp_path: Path) -> None:
    prompt = make(tokenizer, "niah_single_2", 400, essay=["One two three.", "Is it so?"])
    assert prompt.before.count("One two three. Is it so?") > 5


def test_command(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    output, essay = tmp_path / "ruler.jsonl", tmp_path / "essay.txt"
    essay.write_text("It rains. It snows! Does it?\nNo.")
    arguments = ["eval", "ruler", "--model", checkpoint, "--output", output, "--haystack", essay, "--max-tokens", 2]
    small = ["--tasks", "niah_single_1,niah_single_2,fwe", "--lengths", "330,360", "--samples", 1]
    code, out, _ = run(*arguments, *small, "--json")
    result = json.loads(out)
    assert code == 0 and result["answers"] == 6 == len(output.read_text().splitlines()) - 1
    assert [(row["task"], row["length"]) for row in result["results"]][:2] == [
        ("niah_single_1", 330), ("niah_single_2", 330)
    ]  # fmt: skip
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(0 <= line["length"] - line["prompt_tokens"] - line["max_tokens"] < 40 for line in lines[1:])
    whole = output.read_bytes()
    output.write_bytes(whole[:-30])  # killed while it wrote the last one
    code, out, _ = run(*arguments, *small)
    assert code == 0 and "niah_single_2 (match all)" in out and output.read_bytes() == whole
    essay.write_text("It hails.")
    code, _, err = run(*arguments, *small)
    assert code == 2 and "haystack is " in err and output.read_bytes() == whole


def test_rulers_own_files(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    line = {"index": 0, "input": "Document 1:\nA cat.\n\nQuestion: What?", "outputs": ["cat", "a cat"], "length": 60}
    (tmp_path / "qa_1").mkdir()
    (tmp_path / "qa_1" / "validation.jsonl").write_text(json.dumps(line | {"answer_prefix": " Answer:"}) + "\n")
    (tmp_path / "vt.jsonl").write_text(json.dumps(line) + "\n")
    qa, vt = make_prompts([tmp_path / "qa_1" / "validation.jsonl", tmp_path / "vt.jsonl"])
    assert (qa.task, qa.budget, qa.start, qa.saved["metric"]) == ("qa_1", 32, " Answer:", "match any")
    assert (vt.task, vt.budget, vt.start, vt.saved["metric"]) == ("vt", 30, "", "match all")
    files = ["--data", tmp_path / "qa_1" / "validation.jsonl", "--data", tmp_path / "vt.jsonl", "--lengths", 100]
    output = tmp_path / "answers.jsonl"
    code, out, _ = run("eval", "ruler", "--model", checkpoint, *files, "--output", output, "--max-tokens", 2)
    assert code == 0 and "qa_1 (match any)" in out and "vt (match all)" in out
    output.unlink()
    code, _, err = run("eval", "ruler", "--model", checkpoint, *files[:2], "--lengths", 40, "--output", output)
    assert code == 2 and "qa_1, 1: the question and 32 tokens of answer take" in err and not output.exists()


BAD = {
    "--lengths 600": "600 tokens exceed the checkpoint's context of 512",
    "--lengths 150 --tasks niah_single_1": "niah_single_1 takes at least",
    "--lengths 0": "lengths must be in [1, 2**31] tokens, got [0] (--lengths)",
    "--lengths x": "'--lengths': expected integers separated by commas",
    "--tasks niah_single_9": "no task is named 'niah_single_9'; known are niah_single_1",
    "--tasks qa_1": "qa_1 has questions that RULER downloads: it needs the file that RULER makes of them: give --data",
    "--samples 0": "Invalid value for '--samples'",
    "--samples 2147483648": "Invalid value for '--samples'",
    "--max-tokens 0": "Invalid value for '--max-tokens'",
    "--haystack none.txt": "none.txt: no such file (--haystack)",
    "--data none/qa_1.jsonl --lengths 500": "none/qa_1.jsonl: no such file (--data)",
    "--data none.jsonl --lengths 500": "none.jsonl: file or folder must be named after a task",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input(run: Any, checkpoint: Path, tmp_path: Path, arguments: str) -> None:
    output = tmp_path / "ruler.jsonl"
    code, out, err = run("eval", "ruler", "--model", checkpoint, "--output", output, *arguments.split())
    assert (code, out) == (2, "") and BAD[arguments] in err and len(err.splitlines()) == 1
    assert not output.exists()
