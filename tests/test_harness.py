"""lm-eval's tasks with our model: numbers as transformers has them, budgets, stops, and what the result says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_resonance.evaluation.checkpoint import open_checkpoint

import mlx.core as mx
import numpy as np
import pytest

DOCUMENTS = [
    {"question": "def add(a, b):\n    return a", "choices": [" + b", " is None"], "gold": 0},
    {"question": "import", "choices": [" os", " sys"], "gold": 1},
]
COMMON = """
task: tiny_{output_type}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "generate_until": """
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [""], max_tokens: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "multiple_choice": """
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data, cache = folder / "documents.jsonl", folder / "cache"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(output_type=name, data=data, cache=cache) + text)
    return folder


@pytest.fixture(scope="module")
def lm(stdlib_llama: Path) -> Any:
    from mlx_resonance.evaluation.harness import ResonanceLM

    model = ResonanceLM(open_checkpoint("harness", str(stdlib_llama)))
    model.model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="module")
def theirs(stdlib_llama: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stdlib_llama, dtype=torch.float32)

    def log_likelihoods(tokens: list[int]) -> tuple[Any, Any]:
        """Of tokens[1:], each given those before; and which of them are the greedy ones."""
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1].double()
        targets = torch.tensor(tokens[1:])
        scores = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        return scores, logits.argmax(-1) == targets

    return log_likelihoods


def ask(method: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    return list(method([SimpleNamespace(args=given) for given in arguments], disable_tqdm=True))


def test_loglikelihood(lm: Any, theirs: Any) -> None:
    context = "def fibonacci(n):\n    "
    pairs = [
        (context, "return n"),
        ("import", " os"),
        (context, "if n < 2:\n        return n\n"),  # shares the context of the first one
        ("", "import os"),  # after BOS alone
        ("x = ", "1"),  # the space goes to what follows
        ("class Tree" + "\n    # a comment" * 120, "\n    pass"),  # beyond the context of 512 tokens
    ]
    truncated = lm.truncated
    for (before, after), (score, greedy) in zip(pairs, ask(lm.loglikelihood, *pairs), strict=True):
        start = lm.tokenizer.encode(before.rstrip())
        tokens = lm.tokenizer.encode(before + after)
        scores, right = theirs(tokens[-513:])
        count = len(tokens) - len(start)
        assert score == pytest.approx(float(scores[-count:].sum()), abs=1e-3)
        assert greedy == bool(right[-count:].all())
    assert lm.truncated == truncated + 1
    assert ask(lm.loglikelihood, ("import", "")) == [(0, True)]


def test_what_merges_with_the_context_is_scored_all_the_same(lm: Any, theirs: Any) -> None:
    before, after = next(
        (word[:i], word[i:])
        for word in ("return", "import", "self", "class", "def")
        for i in range(1, len(word))
        if len(lm.tokenizer.encode(word)) == len(lm.tokenizer.encode(word[:i])) == 2
    )
    start, rest = lm.tokenizer.encode(before), lm.tokenizer.encode(after, add_special_tokens=False)
    scores, _ = theirs(start + rest)
    assert ask(lm.loglikelihood, (before, after))[0][0] == pytest.approx(float(scores[-len(rest) :].sum()), abs=1e-3)


def test_loglikelihood_rolling(lm: Any, theirs: Any) -> None:
    short, long = "def f(x):\n    return x\n", "".join(f"x{i} = y{i} + {i}\n" for i in range(70))
    bos = lm.tokenizer.bos_token_id
    tokens = lm.tokenizer.encode(long, add_special_tokens=False)
    assert 513 < len(tokens) < 2 * 512
    first = theirs([bos, *tokens[:512]])[0].sum()
    last = theirs(tokens[-513:])[0][-(len(tokens) - 512) :].sum()  # each token once, with a whole context
    found = ask(lm.loglikelihood_rolling, (short,), (long,), ("",))
    expected = theirs([bos, *lm.tokenizer.encode(short, add_special_tokens=False)])[0].sum()
    assert found[0] == pytest.approx(float(expected), abs=1e-3)
    assert found[1] == pytest.approx(float(first + last), rel=1e-6, abs=1e-3)
    assert found[2] == 0


def test_generate_until(lm: Any) -> None:
    def say(**options: Any) -> str:
        (text,) = ask(lm.generate_until, ("def add(a, b):\n    return a", options))
        return text

    whole = say(max_gen_toks=12)
    assert len(whole) > 8
    for until in ([], "", [""], None, ["", "no such text"]):  # none of them stops
        assert say(max_gen_toks=12, until=until) == whole
    stop = whole[4:6]
    assert say(max_gen_toks=12, until=stop) == say(max_gen_toks=12, until=["", stop]) == whole[: whole.index(stop)]
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert say(**{name: 3}) == say(max_gen_toks=3, max_tokens=7) != whole
    assert say(max_gen_toks=12, do_sample=False, temperature=1.0) == whole
    with pytest.raises(ValueError, match="answers of 512 tokens leave no room"):
        say(max_gen_toks=512)


def test_command(run: Any, stdlib_llama: Path, lm: Any, theirs: Any, tasks: Path, tmp_path: Path) -> None:
    arguments = ["eval", "harness", "--model", stdlib_llama, "--include-path", tasks, "--tasks"]
    output = tmp_path / "result.json"
    code, out, _ = run(*arguments, "tiny_generate_until,tiny_multiple_choice", "--json", "--output", output)
    result = json.loads(out)
    assert code == 0 and json.loads(output.read_text()) == result
    assert set(result["results"]) == {"tiny_generate_until", "tiny_multiple_choice"}
    right = []
    for document in DOCUMENTS:
        start = len(lm.tokenizer.encode(document["question"]))
        tokens = [lm.tokenizer.encode(document["question"] + choice) for choice in document["choices"]]
        scores = [float(theirs(ids)[0][start - 1 :].sum()) for ids in tokens]
        right.append(scores.index(max(scores)) == document["gold"])
    assert result["results"]["tiny_multiple_choice"]["acc,none"] == np.mean(right)
    config = result["config"]
    assert config["model"] == str(stdlib_llama) and config["rope"]["rope_theta"] == 10000 and config["digest"]
    assert (config["max_length"], config["truncated"]) == (512, 0) and config["mlx-resonance_version"]
    code, out, _ = run(*arguments, "tiny_multiple_choice", "--limit", 1, "--context", 300, "--kv-bits", 8)
    assert code == 0 and "|tiny_multiple_choice|" in out
    code, _, err = run(*arguments, "tiny_multiple_choice", "--output", output)
    assert code == 2 and "result.json is there already" in err


BAD = {
    "--tasks nothing": "lm-eval has no task named 'nothing'",
    "--tasks tiny_multiple_choice --include-path none": "--include-path none is no folder of tasks",
    "--tasks tiny_multiple_choice --context 513": "513 tokens exceed the checkpoint's context of 512",
    "--tasks tiny_multiple_choice --limit 0": "limit must be at least 1",
    "--tasks tiny_multiple_choice --num-shots -1": "num_shots must be at least 0",
    "--tasks tiny_generate_until --max-tokens 512": "answers of 512 tokens leave no room",
    "--tasks tiny_generate_until --apply-chat-template": "the tokenizer has no chat template",
    "--tasks tiny_multiple_choice --output /dev/null/x.json": "/dev/null is no folder to write to",
    "--tasks broken": "a task cannot be loaded: ",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input(
    run: Any, stdlib_llama: Path, tasks: Path, tmp_path: Path, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_resonance.evaluation import harness

    own = harness.Tasks  # lm-eval's own tasks take half a minute to read
    monkeypatch.setattr(harness, "Tasks", lambda **options: own(**options | {"include_defaults": False}))
    text = (tasks / "multiple_choice.yaml").read_text()
    (tasks / "broken.yaml").write_text(text.replace("tiny_multiple_choice", "broken").replace("choices", "[0, 1]"))
    code, out, err = run("eval", "harness", "--model", stdlib_llama, "--include-path", tasks, *arguments.split())
    assert (code, out) == (2, "") and BAD[arguments] in err.splitlines()[-1]


def test_without_lm_eval(run: Any, stdlib_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mlx_resonance.evaluation.harness", raising=False)
    code, out, err = run("eval", "harness", "--model", stdlib_llama, "--tasks", "any")
    assert (code, out) == (2, "")
    assert err == "error: [harness] lm_eval is missing: pip install 'mlx-resonance[eval]'\n"
