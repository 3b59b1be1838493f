"""lm-eval's tasks on SmolLM2: facts that a model of its size knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

CHOICES = [
    ("The capital of France is", " Paris", " Rome"),
    ("The opposite of hot is", " cold", " red"),
    ("1, 2, 3, 4,", " 5", " 9"),
    ("def add(a, b):\n    return", " a + b", " None"),
]
ANSWERS = [("What is the capital of Japan?", "Tokyo"), ("What is the capital of Germany?", "Berlin")]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWER = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 12}
filter_list: [{name: city, filter: [{function: regex, regex_pattern: "is (\\\\w+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def evaluate(
    run: Any, model: Path, folder: Path, output_type: str, task: str, documents: list[Any], *flags: str
) -> Any:
    """The result of a task of our own."""
    name = f"real_{output_type}"
    (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder, output_type=output_type) + task)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    options = ("--tasks", name, "--include-path", folder, "--context", 512, *flags, "--json")
    code, out, err = run("eval", "harness", "--model", model, *options)
    assert code == 0, err
    return json.loads(out)["results"][name]


def test_the_likelier_choice_is_the_right_one(run: Any, smollm2_32k: Path, tmp_path: Path) -> None:
    documents = [
        {"question": question, "choices": [right, wrong][:: (-1) ** i], "gold": i % 2}
        for i, (question, right, wrong) in enumerate(CHOICES)
    ]
    assert evaluate(run, smollm2_32k, tmp_path, "multiple_choice", CHOICE, documents)["acc,none"] == 1


def test_answers_to_a_chat_are_the_cities(run: Any, smollm2_32k: Path, tmp_path: Path) -> None:
    documents = [{"question": question, "answer": answer} for question, answer in ANSWERS]
    result = evaluate(run, smollm2_32k, tmp_path, "generate_until", ANSWER, documents, "--apply-chat-template")
    assert result["exact_match,city"] == 1
