"""lm-eval's tasks by length, on the user's own files, with consent; prompts that share a beginning; killed runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from mlx_resonance import Checkpoint
from mlx_resonance.cli.eval_harness import Suite
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation import harness_model, mrcr, nolima
from mlx_resonance.evaluation.harness_model import ResonanceLM
from mlx_resonance.evaluation.harness_tasks import add_means, complete_metadata, first_of_each_length
from mlx_resonance.evaluation.suites import SUITES

import pyarrow
import pytest
from pyarrow import parquet

from .checkpoints import source

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def chat_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_ruler_at_two_lengths(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["eval", "harness", "-m", checkpoint, "--factor", 8, "--tasks", "ruler_vt", "--lengths", "2600,2000"]
    options = ("--limit", 2, "--max-tokens", 2, "--output", tmp_path / "log.jsonl")
    code, out, err = run(*arguments, *options, "--log-samples", tmp_path / "samples.jsonl", "--json")
    assert code == 0, err
    result, samples = json.loads(out), lines(tmp_path / "samples.jsonl")
    assert [(sample["task"], sample["doc"]["max_length"]) for sample in samples] == [
        ("ruler_vt", length) for length in (2000, 2000, 2600, 2600)
    ]
    tokenizer = Checkpoint.open(checkpoint).tokenizer
    for sample in samples:
        (text, options_of_it), *_ = sample["arguments"]
        assert options_of_it["max_gen_toks"] == 2 and sample["resps"] == [sample["resps"][0]]
        assert 0.6 * sample["doc"]["max_length"] < len(tokenizer.encode(text)) <= sample["doc"]["max_length"] + 40
    means = {
        length: sum(s[length] for s in samples if s["doc"]["max_length"] == int(length)) / 2
        for length in ("2000", "2600")
    }
    assert result["lengths"] == {length: {"mean": mean, "ruler_vt": mean} for length, mean in means.items()}
    assert "4096,none" not in result["results"]["ruler_vt"] and result["n-samples"]["ruler_vt"]["effective"] == 4
    assert result["context"] == 4096 and result["config"]["truncated"] == 0
    log = (tmp_path / "log.jsonl").read_bytes()
    code, out, _ = run(*arguments, *options)
    assert code == 0 and "|Tokens|2000|2600|" in out and "|mean|" in out and "lost" not in out
    assert (tmp_path / "log.jsonl").read_bytes() == log  # the same rows, all answered


def test_the_suites_of_the_command_are_all() -> None:
    assert get_args(Suite) == tuple(SUITES)


def test_the_first_documents_of_each_length() -> None:
    documents = [{"max_length": length} for length in (4, 4, 4, 8, 8, 4, 8, 8)]
    assert first_of_each_length(documents, 2) == [0, 1, 3, 4]
    assert first_of_each_length([{}, {}, {}], 2) == [0, 1]


def test_means_by_length() -> None:
    result: Any = {
        "results": {
            "a": {"4096,none": -1, "4096_stderr,none": "N/A", "8192,none": 0.5, "8192_stderr,none": 0.1},
            "b": {"4096,none": 1.0, "8192,none": 0.0}, "c": {"acc,none": 0.25}, "all": {"4096,none": -1, "acc,none": 1},
        },
        "groups": {"all": {"4096,none": -1, "acc,none": 1}},
        "group_subtasks": {"all": ["inner", "b"], "inner": ["a"]},
        "configs": {"a": {}, "b": {}, "c": {}},
    }  # fmt: skip
    add_means(result)
    assert result["results"]["a"] == {"8192,none": 0.5, "8192_stderr,none": 0.1}
    assert result["lengths"] == {"4096": {"mean": 1, "b": 1}, "8192": {"mean": 0.25, "a": 0.5, "b": 0}}
    means = {"4096,none": 1, "8192,none": 0.25, "acc,none": 1}
    assert result["groups"]["all"] == result["results"]["all"] == means


def test_code_of_a_tokenizer_needs_consent(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    assert complete_metadata({"a": 1}, [8, 4], ["x"], opened, False) == {
        "a": 1, "max_seq_lengths": [4, 8], "tokenizer": str(checkpoint)
    }  # fmt: skip
    assert complete_metadata(None, [4096], ["babilong_qa1"], opened, False)["max_seq_lengths"] == "4k"
    foreign: Any = {"tokenizer": "someone/model"}
    assert "tokenizer" not in complete_metadata(foreign, None, ["x"], opened, False)
    assert complete_metadata(foreign, None, ["x"], opened, True) == foreign
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    arguments = ("eval", "harness", "-m", folder, "--factor", 8, "--lengths", 2000, "--tasks")
    for task, words in (("ruler_vt", "code that comes with the tokenizer"), ("mrcr", "comes with code")):
        code, out, err = run(*arguments, task, "--metadata", '{"mrcr": "x"}')
        assert (code, out) == (2, "") and words in err and err.endswith("(auto_map): give --trust-remote-code\n")


def conversation(words: int, start: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "Write a poem"}, {"role": "assistant", "content": "a b c " * words},
        {"role": "user", "content": f"Prepend {start} to the poem."},
    ]  # fmt: skip
    return {"prompt": json.dumps(messages), "answer": f"{start}{'a b c ' * words}", "random_string_to_prepend": start}


def test_mrcr(run: Any, chat_model: Path, tmp_path: Path) -> None:
    rows = [conversation(words, f"x{words}") for words in (60, 5, 700, 10)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "2needle.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_seq_lengths": [1200, 1500], "tokenizer": str(chat_model)}
    found = mrcr.read(mrcr=str(tmp_path / "2needle.parquet"), **options)["test"]
    assert list(found) == list(mrcr.read(mrcr=str(tmp_path / "rows.jsonl"), **options)["test"])
    assert [(row["start"], row["max_length"]) for row in found] == [("x60", 1500), ("x5", 1200), ("x10", 1200)]
    assert found[1]["prompt"] == (
        f"<user>Write a poem\n<assistant>{'a b c ' * 5}\n<user>Prepend x5 to the poem.\n<assistant>"
    )
    assert mrcr.score(found[1], ["x5a b d"]) == {
        name: SequenceMatcher(None, "a b d", "a b c " * 5).ratio() for name in ("ratio", "1200")
    }
    assert mrcr.score(found[1], ["a b c"])["ratio"] == 0
    arguments = ["eval", "harness", "-m", chat_model, "--factor", 4, "--suite", "mrcr", "--lengths", "1200,1500"]
    arguments += ["--metadata", json.dumps({"mrcr": str(tmp_path / "rows.jsonl")})]
    code, out, err = run(*arguments, "--limit", 1, "--max-tokens", 3, "--json")
    result = json.loads(out)
    assert code == 0 and set(result["lengths"]) == {"1200", "1500"}, err
    code, _, err = run(*arguments, "--apply-chat-template")
    assert code == 2 and "the prompts of mrcr are chats already (--apply-chat-template)" in err
    part = (tmp_path / "2needle.parquet").read_bytes()[:-9]
    (tmp_path / "part.parquet").write_bytes(part)
    code, _, err = run(*arguments[:-1], json.dumps({"mrcr": str(tmp_path / "part.parquet")}))
    assert code == 2 and "part.parquet is not a whole parquet file" in err and err.endswith("(--metadata)\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "[1]", "answer": "", "random_string_to_prepend": ""}\n')
    code, _, err = run(*arguments)
    assert code == 2 and "rows.jsonl, line 1: the prompt is not a list of messages in JSON (--metadata)" in err


NEEDLES = [
    {
        "id": "0401", "needle": "{CHAR} sails past {1}.", "questions": {"onehop": "Who has been near {2}?"},
        "character_set": ["Ann", "Bob", "Cyd"], "tests": {"T1": {"input_args": ["Oslo", "Norway"]}},
    },
    {
        "id": "0402", "needle": "The boat is {1}.", "questions": {"plain": "Which color has it?"},
        "task_template": "{haystack}|{question}", "tests": {"T1": {"input_args": ["red"], "gold_answers": ["red"]}},
    },
]  # fmt: skip


def test_nolima(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "needles.json").write_text(json.dumps(NEEDLES))
    (tmp_path / "books").mkdir()
    for name in ("a", "b"):
        (tmp_path / "books" / f"{name}.txt").write_text("".join(f"{name}{i} and more\n" for i in range(300)))
    paths = {"nolima_needles": str(tmp_path / "needles.json"), "nolima_haystacks": str(tmp_path / "books")}
    found = nolima.read(max_seq_lengths=[400, 200], tokenizer=str(checkpoint), **paths)["test"]
    assert [row["max_length"] for row in found] == [200] * 104 + [400] * 104  # 2 books, 2 facts, 26 depths
    tokenizer = Checkpoint.open(checkpoint).tokenizer
    for row in found:
        text = nolima.prompt(row)
        own = row["template"] == "{haystack}|{question}"
        book = text.removesuffix("|Which color has it?") if own else text.split("\n\n")[1]
        tokens = tokenizer.encode(book.replace(row["needle"], ""), add_special_tokens=False)
        before = tokenizer.encode(book.partition(row["needle"])[0], add_special_tokens=False)
        assert row["max_length"] - 25 < len(tokens) < row["max_length"] + 8
        assert abs(len(before) / row["max_length"] - row["depth"]) < 0.13 and f" {row['needle']}\n" in text
        assert row["answers"] == (["red"] if own else [row["needle"].split()[0]])
    assert {row["needle"].split()[0] for row in found} == {"Ann", "Bob", "Cyd", "The"}
    assert nolima.score(found[0], [f"It is {found[0]['answers'][0]}."]) == {"contains": 1, "200": 1}
    arguments = ["eval", "harness", "-m", checkpoint, "--factor", 4, "--tasks", "nolima", "--lengths", "200,400"]
    code, out, err = run(*arguments, "--metadata", json.dumps(paths), "--limit", 1, "--max-tokens", 2, "--json")
    assert code == 0 and set(json.loads(out)["lengths"]) == {"200", "400"}, err
    for change, words in (
        ([{"id": 1}], "is not a needle set of NoLiMa: KeyError"),
        ([NEEDLES[0] | {"distractors": {}}], "with distractors cannot be asked here"),
    ):
        (tmp_path / "needles.json").write_text(json.dumps(change))
        code, _, err = run(*arguments, "--metadata", json.dumps(paths))
        assert code == 2 and words in err and err.endswith("(--metadata)\n")
    (tmp_path / "needles.json").write_text(json.dumps(NEEDLES))
    with pytest.raises(UsageError, match="has no 9000 tokens to hide a fact in"):
        nolima.read(max_seq_lengths=[9000], tokenizer=str(checkpoint), **paths)


def test_what_prompts_share_is_read_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, text = Checkpoint.open(checkpoint), source()[:900]
    requests = [(f"{text}\n{ending}", {"until": [], "max_gen_toks": 4}) for ending in ("import os", "def f(", "x = 1")]
    asked = [SimpleNamespace(args=given) for given in (*requests, (text[5:], requests[0][1]))]
    alone = [ResonanceLM(opened, 512).generate_until([request])[0] for request in asked]
    monkeypatch.setattr(harness_model, "STEP", 32)
    given: list[int] = []
    greedy = harness_model.greedy
    monkeypatch.setattr(harness_model, "greedy", lambda *a, **k: given.append(len(a[2])) or greedy(*a, **k))
    read: list[Any] = []
    lm = ResonanceLM(opened, 512, progress=lambda *at: read.append(at))
    lengths = [len(lm.tok_encode(request.args[0])) for request in asked]
    assert lm.generate_until(asked) == alone
    first, second, third, other = sorted(given)
    assert max(first, second) < 64 < min(third, other)  # of the prompts that share a beginning, one is read whole
    assert read[0] == ("generate_until", 0, sum(lengths)) and read[-1] == ("generate_until", sum(lengths), sum(lengths))
    pairs = [SimpleNamespace(args=(request.args[0], " pass")) for request in asked]
    scores = [ResonanceLM(opened, 512).loglikelihood([pair], disable_tqdm=True)[0] for pair in pairs]
    for (score, greedy_one), (expected, expected_one) in zip(
        lm.loglikelihood(pairs, disable_tqdm=True), scores, strict=True
    ):
        assert score == pytest.approx(expected, abs=1e-4) and greedy_one == expected_one


@pytest.mark.parametrize("truncation", ["left", "middle"])
def test_long_prompts_are_cut(checkpoint: Path, truncation: str) -> None:
    lm = ResonanceLM(Checkpoint.open(checkpoint), 100, truncation=truncation)
    long = list(range(10, 310))
    kept, cut = lm._cut(long, 90)
    assert cut and kept == (long[-90:] if truncation == "left" else long[:45] + long[-45:])
    assert lm._cut(long, 300) == (long, False)
    before, after, cut = lm._split(("", ""), long, [5, 6, 7])
    assert cut and after == [5, 6, 7] and len(before) == 98
    assert before == (long[-98:] if truncation == "left" else long[:49] + long[-49:])
    assert lm._split(("", ""), [8], list(range(200)))[1] == list(range(100, 200))  # a target that is too long itself


DOCUMENTS = """
task: shared
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
"""
GENERATE = "generation_kwargs: {until: [], max_gen_toks: 12}\nmetric_list: [{metric: exact_match, aggregation: mean}]\n"
CHOOSE = 'doc_to_choice: [" pass", " return"]\nmetric_list: [{metric: acc, aggregation: mean}]\n'


@pytest.mark.long
def test_sigkill_at_five_moments_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Prompts that share more than a chunk, and choices; the process is killed when the log has grown by a line."""
    rng, text = random.Random(1), source()[:9000]
    documents = [{"text": f"{text[: 7000 + 100 * (i % 2)]}\n# {rng.random()}\ndef f{i}("} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, kind, rest in (("write", "generate_until", GENERATE), ("choose", "multiple_choice", CHOOSE)):
        common = DOCUMENTS.format(kind=kind, data=tmp_path / "data.jsonl", cache=tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(common.replace("task: shared", f"task: {name}") + rest)
    command = [sys.executable, "-c", "from mlx_resonance.cli import main; main()", "eval", "harness", "--tasks"]
    command += ["write,choose", "--include-path", tmp_path, "-m", checkpoint, "--factor", "8"]

    with_torch = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # for `datasets`

    def start(name: str) -> Any:
        places = ["--output", tmp_path / f"{name}.jsonl", "--log-samples", tmp_path / f"{name}.samples"]
        with (tmp_path / f"{name}.out").open("w") as out:
            return subprocess.Popen(
                list(map(str, command + places)), stdout=out, stderr=subprocess.DEVNULL, env=with_torch
            )

    assert start("whole").wait() == 0
    total = len(lines(tmp_path / "whole.jsonl"))
    for moment in range(1, 6):
        process, log = start("killed"), tmp_path / "killed.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3 * moment - 1):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert 3 * moment - 1 < log.read_bytes().count(b"\n") < total and not (tmp_path / "killed.samples").exists()
    assert start("killed").wait() == 0
    for ending in ("out", "samples"):
        assert (tmp_path / f"killed.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    answers = [
        sorted(json.dumps(line) for line in lines(tmp_path / f"{name}.jsonl")[1:-1]) for name in ("whole", "killed")
    ]
    assert answers[0] == answers[1]
