"""The run logs of all evaluations: a killed run resumes, a copied model is the same, other settings are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance import checkpoint as opening

import mlx.core as mx
import pytest

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{max_gen_toks: 2}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ANSWERS = "--max-tokens 2 --context 256 --data"
COMMANDS = {
    "perplexity": "--contexts 32 --truncate --data texts.jsonl --rope default,yarn --factor 2",
    "passkey": "--lengths 160 --depths 50 --repetitions 1",
    "leval": f"{ANSWERS} coursera.jsonl",
    "harness": "--tasks tiny --include-path tasks",
}
LINES = {
    "texts.jsonl": {"text": "def f(x):\n    return x\n" * 9},
    "coursera.jsonl": {"input": "A text.", "instructions": ["Q?"], "outputs": ["A"], "evaluation": "exam"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data for all commands."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tasks").mkdir()
    for name, line in LINES.items():
        (folder / name).write_text(json.dumps(line) + "\n")
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(data=folder / "texts.jsonl", cache=folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def other(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with one weight changed."""
    copy = shutil.copytree(checkpoint, tmp_path_factory.mktemp("other") / "model")
    weights = mx.load(str(copy / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    mx.save_safetensors(str(copy / "model.safetensors"), weights, {"format": "mlx"})
    return copy


BY_DAY = ("harness", "perplexity")


@pytest.mark.parametrize(
    "command", [name if name in BY_DAY else pytest.param(name, marks=pytest.mark.long) for name in COMMANDS]
)
def test_run_log(
    run: Any, checkpoint: Path, other: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(folder)
    output, copied = tmp_path / "log.jsonl", shutil.copytree(checkpoint, tmp_path / "copied")
    arguments = ["eval", command, "--output", output, *COMMANDS[command].split(), "--model"]
    read: list[Path] = []
    for name in ("read_config", "read_header"):
        function = getattr(opening, name)
        monkeypatch.setattr(opening, name, lambda path, function=function: read.append(path) or function(path))
    assert run(*arguments, checkpoint)[0] == 0
    assert read == [checkpoint, checkpoint / "model.safetensors"]  # each once
    whole = output.read_bytes()
    header, *results = whole.splitlines(keepends=True)
    assert json.loads(header)[command] == 1 and str(checkpoint).encode() in whole and results
    if command != "harness":  # whose result has the time of the run
        for part in (b"", header[:20], header, header + results[0][:-1]):
            output.write_bytes(part)
            assert run(*arguments, checkpoint)[0] == 0 and output.read_bytes() == whole
    digests = [Checkpoint.open(model).digest for model in (checkpoint, other)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load", None)  # nothing is left to do, and a refusal comes before the weights
        assert run(*arguments, copied)[0] == 0 and output.read_bytes() == whole
        refused = {"kv_bits is null there and 8 here": [checkpoint, "--kv-bits", 8]}
        if command != "perplexity":  # there each line has its digest, so that models and ropes can be compared
            refused[f'digest is "{digests[0]}" there and "{digests[1]}" here'] = [other]
            refused["max_position_embeddings is 512 there and 1024 here"] = [checkpoint, "--factor", 2]
        for message, changed in refused.items():
            code, out, err = run(*arguments, *changed)
            assert (code, out) == (2, "") and f"results with other settings: {message}" in err
            assert err.endswith("give another --output\n") and len(err.splitlines()) == 1
        assert output.read_bytes() == whole
    if command == "perplexity":
        assert run(*arguments, other)[0] == 0 and run(*arguments, checkpoint, "--factor", 4)[0] == 0
        assert (
            output.read_bytes().startswith(whole) and len(output.read_bytes().splitlines()) == 1 + len(results) + 3
        )  # yarn × 4 is new


@pytest.mark.parametrize("command", COMMANDS)
def test_another_file_is_refused(
    run: Any, checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(folder)
    output = tmp_path / "notes.txt"
    arguments = ["eval", command, "--output", output, *COMMANDS[command].split(), "--model", checkpoint]
    for content, message in (
        ('{"a": 1}\n', f"is not a run log of {command} results: its first line must hold the settings"),
        ("notes", f"is not a run log of {command} results: its last line is not JSON"),
    ):
        output.write_text(content)
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and message in err and err.endswith("give another --output\n")
        assert output.read_text() == content
