"""lm-eval's tasks with our model and with its own backend for transformers: the same requests, the same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

THEIRS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

settings = json.loads(sys.argv[1])
manager = TaskManager(include_path=settings["folders"], include_defaults=False, metadata=settings["metadata"])
result = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": settings["model"], "dtype": "float32", "max_length": settings["context"]},
    tasks=settings["tasks"], device="cpu", batch_size=1, samples=settings["samples"], gen_kwargs=settings["gen_kwargs"],
    task_manager=manager, log_samples=True,
)
found = {"results": result["results"], "samples": result["samples"]}
open(settings["output"], "w").write(json.dumps(found, default=handle_non_serializable))
"""
CHOICES = [("The capital of France is", ["Paris", "Rome"]), ("The opposite of hot is", ["red", "cold"])]
STORY = "Ann put the {thing} into the {place} and went home. Then it rained for a long time. "
LOCAL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{{split}: {data}}}, cache_dir: {cache}}}
{rest}
"""
CHOOSE = """
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]
"""
WRITE = """
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
num_fewshot: 1
fewshot_split: test
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, ignore_punctuation: true}]
"""


def long_questions() -> list[dict[str, Any]]:
    """Documents in the format of LongBench v2; the last one exceeds the context of the test."""
    things, places = ("key", "map", "ring", "coin"), ("box", "jar", "bag", "cup")
    turns = [range(5 + 10 * i) for i in range(4)]
    return [
        {
            "context": "".join(STORY.format(thing=things[(i + j) % 4], place=places[j % 4]) for j in turns[i]),
            "question": f"Where did Ann put the {things[i]} first? ", "choices": list(places), "answer": "ABCD"[i],
        }
        for i in range(4)
    ]  # fmt: skip


def write_tasks(folder: Path) -> None:
    """Tasks on local files: a choice, an answer after an example, and LongBench v2 as lm-eval asks it."""
    import lm_eval.tasks

    common = Path(lm_eval.tasks.__file__).parent / "longbench2" / "_longbench_common_yaml"
    small = [{"question": question, "choices": choices, "gold": i} for i, (question, choices) in enumerate(CHOICES)]
    for name, split, rest, documents in (
        ("choose", "test", CHOOSE, small),
        ("write", "test", WRITE, small),
        ("longbench2_local", "train", f"include: {common}", long_questions()),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        text = LOCAL.format(name=name, split=split, data=data, cache=folder / "cache", rest=rest)
        (folder / f"{name}.yaml").write_text(text)


def compare(settings: dict[str, Any], flags: list[Any], folder: Path) -> dict[str, Any]:
    """Run both, each in a process of its own, and compare them sample by sample. Returns our result."""
    theirs, samples = folder / "theirs.json", folder / "ours.jsonl"
    settings |= {"output": str(theirs)}
    with_torch = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    backend = [sys.executable, "-c", THEIRS, json.dumps(settings)]
    subprocess.run(backend, check=True, stdout=subprocess.DEVNULL, env=with_torch)
    command = [sys.executable, "-c", "from mlx_resonance.cli import main; main()", "eval", "harness", "--json"]
    command += ["-m", settings["model"], "--tasks", ",".join(settings["tasks"]), "--context", str(settings["context"])]
    command += ["--log-samples", str(samples), *map(str, flags)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=with_torch)
    result, found = json.loads(done.stdout), json.loads(theirs.read_text())
    ours: dict[str, list[Any]] = {}
    for line in samples.read_text().splitlines():
        ours.setdefault(json.loads(line)["task"], []).append(json.loads(line))
    for task, expected in found["samples"].items():
        assert len(ours[task]) == len(expected) > 0
        for one, other in zip(ours[task], expected, strict=True):
            assert one["arguments"] == other["arguments"] and one["doc"] == other["doc"]
            assert {name: one[name] for name in one["metrics"]} == {name: other[name] for name in other["metrics"]}
            for said, wanted in zip(one["resps"], other["resps"], strict=True):
                if isinstance(wanted[0], str):
                    assert said == wanted
                else:  # a log-likelihood, in float32 by two frameworks
                    assert said[0][1] == wanted[0][1] and said[0][0] == pytest.approx(wanted[0][0], abs=2e-3)
        for name, value in found["results"][task].items():
            if "stderr" not in name and value != -1:
                assert result["results"][task][name] == value
    return result


@pytest.mark.long
def test_local_files(smollm2: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    settings = {"tasks": ["choose", "write", "longbench2_local"], "folders": [str(tmp_path)], "context": 600}
    settings |= {"model": str(smollm2), "metadata": {}, "samples": None, "gen_kwargs": None}
    result = compare(settings, ["--include-path", tmp_path], tmp_path)
    assert (
        result["results"]["choose"]["acc,none"] == 1 and result["config"]["truncated"] == 4
    )  # choices of one document


@pytest.mark.long
def test_rulers_tasks_that_need_no_download(smollm2: Path, tmp_path: Path) -> None:
    import lm_eval.tasks

    tasks = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    settings = {"tasks": tasks, "folders": [str(Path(lm_eval.tasks.__file__).parent / "ruler")], "context": 2048}
    settings |= {"metadata": {"tokenizer": str(smollm2), "max_seq_lengths": [1024]}, "model": str(smollm2)}
    settings |= {"samples": {task: [0] for task in tasks}, "gen_kwargs": {"max_gen_toks": 40}}
    result = compare(settings, ["--lengths", 1024, "--limit", 1, "--max-tokens", 40], tmp_path)
    assert set(result["lengths"]["1024"]) == {"mean", *tasks}
