"""mlx-lm's commands on a checkpoint with a resonance rope type, as a user runs them.

Not run here: `evaluate` downloads its tasks, and `perplexity` reads its text with the package datasets, from the hub.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance.cli.lm import refuse_empty

import pytest

SCRIPTS = Path(sys.executable).parent
# 700 tokens: the checkpoint was trained on 512.
PROMPT = (
    "import os\n\n\ndef walk(top, depth=0):\n    for name in sorted(os.listdir(top)):\n        yield name\n\n\n" * 20
)


def execute(script: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A console script of this environment, offline."""
    return subprocess.run(
        [SCRIPTS / script, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def lm(*arguments: object, stdin: str = "") -> str:
    """The output of `mlx-resonance lm …`, which must succeed."""
    done = execute("mlx-resonance", "lm", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert "rope_type" not in done.stderr  # transformers warns about types that it does not know
    return done.stdout


def rope_type(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["rope_scaling"]["rope_type"]


def test_generate_gives_the_same_text_as_ours(run: Any, extended: Path) -> None:
    options = ("generate", "--model", extended, "--max-tokens", 32, "--prompt", PROMPT)
    own = json.loads(run(*options, "--json")[1])
    assert own["prompt_tokens"] > 512 and own["generation_tokens"] == 32
    assert lm(*options, "--verbose", "False") == own["text"] + "\n"


def test_stock_mlx_lm_refuses_the_rope_type(extended: Path) -> None:
    done = execute("mlx_lm", "generate", "--model", extended, "--max-tokens", 1, "--prompt", "import")
    assert done.returncode != 0 and "resonance_yarn" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_lora_then_fuse(extended: Path, tmp_path: Path) -> None:
    import mlx_resonance

    import mlx.core as mx

    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"import os\n\n\ndef function_{i}():\n    return {i}\n"}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    adapters, fused = tmp_path / "adapters", tmp_path / "fused"
    lm(
        "lora", "--train", "--model", extended, "--data", tmp_path, "--adapter-path", adapters, "--iters", 2,
        "--batch-size", 2, "--num-layers", 1, "--val-batches", 1, "--learning-rate", 1e-3,
    )  # fmt: skip
    lm("fuse", "--model", extended, "--adapter-path", adapters, "--save-path", fused)
    assert rope_type(extended) == rope_type(fused) == "resonance_yarn"
    tokens = mx.array([[1, 2, 3, 4]])
    models = [mlx_resonance.load(folder)[0] for folder in (extended, fused)]
    before, after = (model(tokens) for model in models)
    adapted = mlx_resonance.load(extended, adapter_path=str(adapters))[0](tokens)
    assert mx.abs(after - before).max().item() > 1e-4
    assert mx.allclose(after, adapted, atol=1e-4)


def test_cache_prompt_keeps_what_our_own_model_does(extended: Path, tmp_path: Path) -> None:
    import mlx_resonance
    from mlx_resonance.generation import prompt_tokens

    import mlx.core as mx
    from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

    file = tmp_path / "cache.safetensors"
    lm("cache_prompt", "--model", extended, "--prompt", "-", "--prompt-cache-file", file, stdin=PROMPT)
    model, tokenizer = mlx_resonance.load(extended)
    own = make_prompt_cache(model)
    model(mx.array([prompt_tokens(tokenizer, PROMPT)]), own)
    for theirs, ours in zip(load_prompt_cache(str(file)), own, strict=True):
        assert theirs.offset == ours.offset > 512
        for one, other in zip(theirs.state[:2], ours.state[:2], strict=True):  # keys and values
            assert mx.allclose(one, other, atol=1e-3)


@pytest.fixture
def run_lm(run: Any, installed: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run_lm(argument, …) -> exit code, stdout, stderr, in this process; `install` is undone afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *arguments: run("lm", *arguments)


def test_arguments_and_exit_codes_are_mlx_lms(run_lm: Any) -> None:
    code, out, err = run_lm("generate", "--help")
    assert (code, err) == (0, "") and out.startswith("usage: mlx-resonance lm generate ") and "--top-k" in out
    code, out, err = run_lm("generate", "--max-tokens", "many")
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("mlx-resonance lm generate: error: argument ")


@pytest.mark.parametrize("arguments", [(), ("frobnicate", "--model", "x")])
def test_no_or_an_unknown_subcommand_is_one_line_and_exit_2(run_lm: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = run_lm(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert all(repr(name) in err for name in ("chat", "convert", "fuse", "generate", "lora", "server"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "damaged"),
        ("no weights", "model.safetensors is missing"),
        ("config is not JSON", "Expecting property name"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_line_and_exit_2(
    run_lm: Any, extended: Path, tmp_path: Path, kind: str, message: str
) -> None:
    folder = tmp_path / "damaged"
    if kind != "missing":
        shutil.copytree(extended, folder)
        if kind == "no weights":
            (folder / "model.safetensors").unlink()
        else:
            (folder / "config.json").write_text("{")
    code, out, err = run_lm("generate", "--model", folder)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--model", ""),
        ("lora", "--model", "{model}", "--train", "--data", ""),
        ("lora", "--model", "{model}", "--train", "--data="),
        ("cache_prompt", "--model", "{model}", "--prompt", "x", "--prompt-cache-file", " "),
        ("convert", "--hf-path", "", "--mlx-path", "{model}-out"),
    ],
)
def test_an_empty_path_is_refused(arguments: tuple[str, ...], stdlib_llama: Path, tmp_path: Path, run: Any) -> None:
    """mlx-lm would take the current folder."""
    code, out, err = run("lm", *(part.format(model=stdlib_llama) for part in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1) and "is empty" in err


def test_an_empty_text_is_for_mlx_lm_to_judge() -> None:
    refuse_empty(["generate", "--prompt", "", "--system-prompt=", "--ignore-chat-template"])


def test_a_result_that_cannot_be_written_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise RuntimeError("[write] Unable to write 8 bytes to file.")

    monkeypatch.setattr("mlx_lm.cli.main", full)
    code, out, err = run("lm", "convert", "--hf-path", "x")
    assert (code, out, err.count("\n")) == (1, "", 1) and "is the disk full? [write] Unable to write" in err


def test_what_mlx_lm_does_not_implement_is_one_line_and_exit_2(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As quantized keys of layers with a sliding window."""

    def refused() -> None:
        raise NotImplementedError("RotatingKVCache Quantization NYI")

    monkeypatch.setattr("mlx_lm.cli.main", refused)
    code, _, err = run("lm", "generate", "--kv-bits", "8")
    assert (code, err) == (2, "error: RotatingKVCache Quantization NYI\n")
