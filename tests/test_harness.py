"""lm-eval's tasks with our model: the same numbers as transformers, budgets, stops, results, and runs that resume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation.responses import Responses
from mlx_resonance.scaling import named_rope

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
def lm(checkpoint: Path) -> Any:
    from mlx_resonance.evaluation.harness_model import ResonanceLM

    return ResonanceLM(Checkpoint.open(checkpoint), 512)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def log_likelihoods(tokens: list[int]) -> tuple[Any, Any]:
        """Log-likelihoods of tokens[1:], each given those before it; and which of them are the greedy choice."""
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
        ("x = ", "1"),  # the space belongs to what follows
        ("class Tree" + "\n    # a comment" * 120, "\n    pass"),  # beyond the context of 512 tokens
    ]
    truncated = lm.responses.truncated
    for (before, after), (score, greedy) in zip(pairs, ask(lm.loglikelihood, *pairs), strict=True):
        start = lm.tokenizer.encode(before.rstrip())
        tokens = lm.tokenizer.encode(before + after)
        scores, right = theirs(tokens[-513:])
        count = len(tokens) - len(start)
        assert score == pytest.approx(float(scores[-count:].sum()), abs=1e-3)
        assert greedy == bool(right[-count:].all())
    assert lm.responses.truncated == truncated + 1
    assert ask(lm.loglikelihood, ("import", "")) == [(0, True)]


def test_a_continuation_that_merges_with_the_context_is_scored(lm: Any, theirs: Any) -> None:
    before, after = next(
        (word[:i], word[i:])
        for word in ("return", "import", "self", "class", "def")
        for i in range(1, len(word))
        if len(lm.tokenizer.encode(word)) == len(lm.tokenizer.encode(word[:i])) == 2
    )
    start, rest = lm.tokenizer.encode(before), lm.tokenizer.encode(after, add_special_tokens=False)
    scores, _ = theirs(start + rest)
    assert ask(lm.loglikelihood, (before, after))[0][0] == pytest.approx(float(scores[-len(rest) :].sum()), abs=1e-3)


def test_angles_that_change_with_the_length_do_not_depend_on_other_requests(checkpoint: Path) -> None:
    from mlx_resonance.evaluation.harness_model import ResonanceLM

    opened = Checkpoint.open(checkpoint)
    dynamic = ResonanceLM(opened.with_rope(named_rope(opened.own_rope, "dynamic", 4)), 2048)
    context = "class Tree" + "\n    # a comment" * 126  # beyond 512 tokens the angles depend on the length
    pairs = [(context, "\n    pass"), (context, "\n    x = 1" * 20)]
    together = ask(dynamic.loglikelihood, *pairs)
    assert together == [ask(dynamic.loglikelihood, pair)[0] for pair in pairs]


def test_loglikelihood_rolling(lm: Any, theirs: Any) -> None:
    short, long = "def f(x):\n    return x\n", "".join(f"x{i} = y{i} + {i}\n" for i in range(70))
    bos = lm.tokenizer.bos_token_id
    tokens = lm.tokenizer.encode(long, add_special_tokens=False)
    assert 513 < len(tokens) < 2 * 512
    first = theirs([bos, *tokens[:512]])[0].sum()
    last = theirs(tokens[-513:])[0][-(len(tokens) - 512) :].sum()  # each token once, with a full context
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
    for until in ([], "", [""], None, ["", "no such text"]):  # none of them stops the text
        assert say(max_gen_toks=12, until=until) == whole
    stop = whole[4:6]
    assert say(max_gen_toks=12, until=stop) == say(max_gen_toks=12, until=["", stop]) == whole[: whole.index(stop)]
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert say(**{name: 3}) == say(max_gen_toks=3, max_tokens=7) != whole
    assert say(max_gen_toks=12, do_sample=False, temperature=1.0) == whole
    with pytest.raises(UsageError, match="answers of 512 tokens leave no room"):
        say(max_gen_toks=512)


def test_command(run: Any, checkpoint: Path, lm: Any, theirs: Any, tasks: Path, tmp_path: Path) -> None:
    arguments = ["eval", "harness", "--model", checkpoint, "--include-path", tasks, "--tasks"]
    output = tmp_path / "responses.jsonl"
    code, out, _ = run(*arguments, "tiny_generate_until,tiny_multiple_choice", "--json", "--output", output)
    result = json.loads(out)
    assert code == 0 and json.loads(output.read_text().splitlines()[-1])["response"] == result
    assert set(result["results"]) == {"tiny_generate_until", "tiny_multiple_choice"}
    right = []
    for document in DOCUMENTS:
        start = len(lm.tokenizer.encode(document["question"]))
        tokens = [lm.tokenizer.encode(document["question"] + choice) for choice in document["choices"]]
        scores = [float(theirs(ids)[0][start - 1 :].sum()) for ids in tokens]
        right.append(scores.index(max(scores)) == document["gold"])
    assert result["results"]["tiny_multiple_choice"]["acc,none"] == np.mean(right)
    assert result["model"] == str(checkpoint) and result["rope"]["rope_theta"] == 10000 and result["digest"]
    assert (result["context"], result["truncation"], result["chat_template"]) == (512, "left", False)
    assert result["version"]["lm-eval"] and (result["config"]["requests"], result["config"]["truncated"]) == (6, 0)
    options = ("--limit", 1, "--context", 300, "--kv-bits", 8, "--truncation", "middle")
    code, out, _ = run(*arguments, "tiny_multiple_choice", *options)
    assert code == 0 and "|tiny_multiple_choice|" in out and f"model {checkpoint}, digest {result['digest']}" in out
    assert "rope default, base 10000" in out and "context 300, 0 of 2 prompts cut in the middle (middle)" in out


def test_a_killed_run_resumes(
    run: Any, checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_resonance.evaluation import harness_model as harness

    common = ["eval", "harness", "--include-path", tasks, "--json", "--model"]
    both, output = ["--tasks", "tiny_generate_until,tiny_multiple_choice"], tmp_path / "responses.jsonl"
    computed: list[str] = []
    kill_at = 0

    def counted(function: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            computed.append(function.__name__)
            if len(computed) == kill_at:
                raise KeyboardInterrupt
            return function(*given, **options)

        return call

    monkeypatch.setattr(harness, "greedy", counted(harness.greedy))
    monkeypatch.setattr(harness.ResonanceLM, "_score", counted(harness.ResonanceLM._score))
    code, out, _ = run(*common, checkpoint, *both, "--output", tmp_path / "whole.jsonl")
    whole, asked = json.loads(out), len(computed)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert code == 0 and asked == 4 and len(lines) == 1 + 6 + 1  # two pairs of choices share a context

    kill_at = asked + 4
    assert run(*common, checkpoint, *both, "--output", output)[0] == 130
    assert len(computed) == asked + 4 and len(output.read_text().splitlines()) < 1 + 6
    output.write_bytes(output.read_bytes()[:-5])  # the last response is not whole
    kill_at, before = 0, len(computed)
    # A copied model is the same model: the digest is of its content.
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    code, out, _ = run(*common, copied, *both, "--output", output)
    resumed = json.loads(out)
    assert code == 0 and len(computed) - before == 2  # the one that was killed, and the one that was cut
    for key in ("results", "n-samples"):
        assert resumed[key] == whole[key]
    assert sorted(output.read_text().splitlines()[1:-1]) == sorted(lines[1:-1])

    monkeypatch.setattr(Checkpoint, "load", None)  # nothing left to do
    content = output.read_bytes()
    code, out, _ = run(*common, checkpoint, *both, "--output", output)
    assert code == 0 and json.loads(out)["results"] == whole["results"] and output.read_bytes() == content
    for option, values in (
        ("--max-tokens 1", "max_tokens is null there and 1 here"),
        ("--context 1", "context is 512 there and 1 "),
        ("--kv-bits 8", "kv_bits is null there and 8 here"),
        ("--num-shots 1", "num_shots is null"),
        ("--truncation middle", 'truncation is "left" there and "middle" here'),
    ):
        code, _, err = run(*common, checkpoint, *both, "--output", output, *option.split())
        assert code == 2 and f"results with other settings: {values}" in err and err.endswith("give another --output\n")
    assert output.read_bytes() == content


def test_more_tasks_in_the_same_file(run: Any, checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "responses.jsonl"
    common = ["eval", "harness", "--model", checkpoint, "--include-path", tasks, "--output", output, "--tasks"]
    assert run(*common, "tiny_multiple_choice")[0] == 0 and run(*common, "tiny_generate_until")[0] == 0
    kinds = [json.loads(line).get("request") for line in output.read_text().splitlines()]
    assert kinds == [None, *["loglikelihood"] * 4, "result", *["generate_until"] * 2, "result"]
    lines = output.read_text().splitlines()
    broken = json.loads(lines[1]) | {"response": "no"}
    output.write_text("\n".join([lines[0], json.dumps(broken), *lines[2:]]) + "\n")
    code, _, err = run(*common, "tiny_multiple_choice")
    assert code == 2 and "a response to loglikelihood is 'no'" in err.splitlines()[-1]


def test_sampled_answers_to_one_request_are_several(tmp_path: Path) -> None:
    responses = Responses(tmp_path / "responses.jsonl", {"digest": "d"})
    arguments = [("a", {"temperature": 1.0})] * 2 + [("a", {"temperature": 0.0})] * 2
    computed: list[int] = []

    def compute(missing: list[int]) -> Any:
        for i in missing:
            computed.append(i)
            yield [(i, f"answer {i}", i == 1)]

    found = responses.respond("generate_until", arguments, compute)
    assert found == ["answer 0", "answer 1", "answer 3", "answer 3"] and responses.truncated == 1
    again = Responses(tmp_path / "responses.jsonl", {"digest": "d"})
    assert again.respond("generate_until", arguments, compute) == found and computed == [0, 1, 3]
    assert again.truncated == 1


BAD = {
    "": "either tasks or a suite is needed: give --tasks or --suite",
    "--tasks nothing": "lm-eval has no task named 'nothing' (--tasks)",
    "--tasks nothing --suite ruler": "either tasks or a suite is needed: give --tasks or --suite",
    "--suite longbench3": "'longbench3' is not one of 'ruler', 'babilong'",
    "--tasks tiny_multiple_choice --include-path none": "none is not a folder of tasks (--include-path)",
    "--tasks tiny_multiple_choice --context 513": "513 tokens exceed the checkpoint's context of 512 tokens: give --f",
    "--tasks tiny_multiple_choice --limit 0": "Invalid value for '--limit'",
    "--tasks tiny_multiple_choice --num-shots -1": "Invalid value for '--num-shots'",
    "--tasks tiny_multiple_choice --num-shots 2147483648": "Invalid value for '--num-shots'",
    "--tasks tiny_generate_until --max-tokens 512": "answers of 512 tokens leave no room for a prompt",
    "--tasks tiny_generate_until --apply-chat-template": "the tokenizer has no chat template (--apply-chat-template)",
    "--tasks tiny_multiple_choice --output /dev/null/x.json": "/dev/null is not a folder",
    "--tasks tiny_multiple_choice --output /dev/null": "/dev/null is a device: a file is needed: give another --output",
    "--tasks broken": "a task cannot be loaded: ",
    "--tasks unsafe": "unsafe runs code that the model writes: give --confirm-run-unsafe-code",
    "--tasks mrcr --lengths 1000": "1,000 tokens exceed the checkpoint's context of 512 tokens: give --factor 2",
    "--tasks mrcr --lengths 500 --context 400": "prompts of 500 tokens exceed the context of 400 tokens (--lengths)",
    "--tasks mrcr --lengths 0": "lengths must be in [1, 2**31] tokens, got [0] (--lengths)",
    "--tasks tiny_multiple_choice --lengths 300": "none of these tasks comes in several lengths (--lengths)",
    "--suite ruler --lengths 500": "RULER makes no prompts of less than 1024 tokens: it would not end (--lengths)",
    "--tasks mrcr": "mrcr is asked at given lengths: give --lengths",
    "--tasks mrcr --lengths 500": '{"mrcr": "PATH"} is missing in the metadata (--metadata)',
    '--tasks mrcr --lengths 500 --metadata {"mrcr":"no.jsonl"}': "no.jsonl: no such file (--metadata)",
    '--tasks nolima --lengths 500 --metadata {"nolima_needles":5}': '{"nolima_needles": "PATH"} is missing',
    '--tasks mrcr --lengths 500 --metadata {"max_seq_lengths":[4]}': "lengths are given twice",
    "--tasks mrcr --metadata {": "Invalid value for '--metadata': '{' is not JSON",
    "--tasks mrcr --metadata [1]": "Invalid value for '--metadata': '[1]' is not a JSON object",
    "--tasks babilong_qa1,mrcr --lengths 300": "babilong takes one length, and no other tasks beside it (--lengths)",
    "--tasks babilong_qa1 --lengths 300": "babilong has lengths of 1024, 2048, 4096, …, not 300 (--lengths)",
    "--tasks tiny_multiple_choice --log-samples /dev/null": "/dev/null is a device: a file is needed: give another --l",
    "--tasks tiny_multiple_choice --log-samples responses.jsonl": "responses.jsonl is the file of the run log, too",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input(
    run: Any, checkpoint: Path, tasks: Path, tmp_path: Path, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_resonance.evaluation import harness_tasks

    own = harness_tasks.Tasks  # lm-eval's own tasks take half a minute to read
    monkeypatch.setattr(harness_tasks, "Tasks", lambda **options: own(**options | {"include_defaults": False}))
    text = (tasks / "multiple_choice.yaml").read_text()
    (tasks / "broken.yaml").write_text(text.replace("tiny_multiple_choice", "broken").replace("choices", "[0, 1]"))
    (tasks / "unsafe.yaml").write_text(text.replace("tiny_multiple_choice", "unsafe") + "unsafe_code: true\n")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "responses.jsonl"
    common = ("--model", checkpoint, "--include-path", tasks, "--output", output)
    code, out, err = run("eval", "harness", *common, *arguments.split())
    assert (code, out) == (2, "") and BAD[arguments] in err.splitlines()[-1] and not output.exists()


def test_without_lm_eval(run: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("harness", "harness_model", "harness_tasks"):
        monkeypatch.delitem(sys.modules, f"mlx_resonance.evaluation.{name}", raising=False)
    code, out, err = run("eval", "harness", "--model", checkpoint, "--tasks", "any")
    assert (code, out) == (2, "")
    assert err == "error: lm_eval is missing: pip install '.[eval]' in a clone of mlx-resonance\n"
