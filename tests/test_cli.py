"""The commands as a user runs them: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GENERATION_KEYS = [
    "text", "prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "peak_memory", "finish_reason",
]  # fmt: skip


def test_convert_says_what_rounding_costs(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "convert", stdlib_llama, "--mlx-path", tmp_path / "out", "--rope", "yarn", "--factor", 8, "--json"
    )
    assert code == 0
    assert json.loads(out)["largest_shift"] == pytest.approx(0.0452, abs=1e-4)
    notes = [line for line in err.splitlines() if line.startswith("note: rounding")]
    assert len(notes) == 1 and "4.5 %" in notes[0]


def test_convert_without_resonance_has_nothing_to_note(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", stdlib_llama, "--mlx-path", tmp_path / "out", "--no-resonance")
    assert (code, out) == (0, "")
    assert "note:" not in err


def test_inspect_json(run: Any, extended: Path) -> None:
    code, out, _ = run("inspect", extended, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (result["rope_type"], result["base"], result["dims"], result["factor"]) == ("resonance_yarn", 10000, 64, 8)
    assert result["original_max_position_embeddings"] == 512
    assert result["attention_scale"] == pytest.approx(1.2079442)
    assert result["wavelengths"][:4] == [6, 8, 11, 15]
    assert result["angle_shift"][0] == pytest.approx(0.0451, abs=1e-4)
    assert result["critical_pairs"] == 13
    assert len(result["feature_gap"]) == 32 and 0.0001 < min(result["feature_gap"]) < max(result["feature_gap"]) < 0.06


def test_inspect_table_has_a_row_for_every_pair(run: Any, stdlib_llama: Path) -> None:
    code, out, _ = run("inspect", stdlib_llama, "--test-length", 1024)
    rows = [line.split() for line in out.splitlines() if line.lstrip()[:1].isdigit()]
    assert code == 0
    rows = [row for row in rows if row[-2] in ("yes", "no")]
    assert [int(row[0]) for row in rows] == list(range(32))
    assert rows[0][:5] == ["0", "6.283", "6", "4.507", "%"] and "unrounded" in out
    assert [row[-2] for row in rows] == ["yes" if float(row[1].replace(",", "")) <= 512 else "no" for row in rows]
    _, longer, _ = run("inspect", stdlib_llama, "--test-length", 2048)
    assert longer.split("\n")[2:] != out.split("\n")[2:]  # the feature gap depends on it


def test_inspect_plot(run: Any, extended: Path, tmp_path: Path) -> None:
    code, _, _ = run("inspect", extended, "--plot", tmp_path / "plot.png")
    assert code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_generate_streams_the_text_that_json_holds(run: Any, extended: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("import os\n\n\ndef main")
    options = ("generate", "--model", extended, "--max-tokens", 24, "--temp", 0.8, "--seed", 7)
    code, text, err = run(*options, "--prompt-file", tmp_path / "prompt.txt")
    assert code == 0 and "tokens/s" in err and re.search(r"peak memory [\d,]+\.\d+ (MB|GB)\n$", err)
    code, out, _ = run(*options, "--json", stdin="import os\n\n\ndef main")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert list(result) == GENERATION_KEYS
    assert result["text"] + "\n" == text
    assert 0 < result["generation_tokens"] <= 24 and 0.01 < result["peak_memory"] < 100  # GB
    assert result["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("option", [("--prefill-step-size", 5), ("--kv-bits", 8)])
def test_generate_options_leave_the_text_as_it_is(run: Any, extended: Path, option: tuple[str, int]) -> None:
    arguments = ("generate", "--model", extended, "--max-tokens", 8, "--json", "--prompt", "import os\nimport re\n" * 4)
    plain, other = run(*arguments)[1], run(*arguments, *option)[1]
    # 8-bit keys and values change the logits by far less than the lead of the most likely token here.
    assert json.loads(plain)["text"] == json.loads(other)["text"] != ""


def damaged(kind: str, stdlib_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint with one thing wrong."""
    import shutil

    folder = tmp_path / "damaged"
    if kind == "missing folder":
        return folder
    shutil.copytree(stdlib_llama, folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "no safetensors":
        weights.unlink()
    elif kind == "truncated safetensors":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "truncated header":
        weights.write_bytes(weights.read_bytes()[:100])
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif kind == "no vocab_size":
        del config["vocab_size"]
    elif kind == "unknown rope type":
        config["rope_scaling"] = {"rope_type": "spiral"}
    if kind in ("no vocab_size", "unknown rope type"):
        (folder / "config.json").write_text(json.dumps(config))
    return folder


DAMAGES = {
    "missing folder": "no such folder",
    "no safetensors": "no model*.safetensors",
    "truncated safetensors": "not a complete safetensors file",
    "truncated header": "not a complete safetensors file",
    "no config": "no config.json",
    "config is not JSON": "not JSON",
    "no vocab_size": "vocab_size",
    "unknown rope type": "'spiral'",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("command", ["convert", "generate", "inspect"])
def test_a_damaged_checkpoint_is_one_line_and_exit_2(
    run: Any, stdlib_llama: Path, tmp_path: Path, command: str, kind: str
) -> None:
    folder, out = damaged(kind, stdlib_llama, tmp_path), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    arguments = {
        "convert": ("convert", folder, "--mlx-path", out),
        "generate": ("generate", "--model", folder, "--prompt", "import"),
        "inspect": ("inspect", folder, "--plot", tmp_path / "plot.png"),
    }
    code, stdout, stderr = run(*arguments[command])
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert stderr.startswith("error: ") and DAMAGES[kind] in stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("convert", "{model}"), "--mlx-path"),
        (("convert", "{model}", "--mlx-path", "{model}"), "exists"),
        (("convert", "{model}", "--mlx-path", "{new}", "--factor", "many"), "--factor"),
        (("convert", "{model}", "--mlx-path", "{new}", "--rope", "yarn", "--factor", "1e308"), "--factor"),
        (("inspect", "{model}", "--train-length", "0"), "--train-length"),
        (("inspect", "{model}", "--train-length", "900", "--test-length", "800"), "test_length"),
        (("inspect", "{model}", "--plot", "{new}.xyz"), "suffix"),
        (("generate",), "--model"),
        (("generate", "--model", "{model}", "--prompt", ""), "prompt is empty"),
        (("generate", "--model", "{model}", "--prompt-file", "{new}"), "no such file (--prompt-file)"),
        (("generate", "--model", "{model}", "--prompt", "a", "--prompt-file", "{model}"), "is a folder"),
        (("generate", "--model", "{model}", "-f", "-", "-f", "-"), "standard input can be read once"),
        (("generate", "--model", "{model}", "-p", "a", "--system-prompt", "b"), "without a chat template"),
        (("generate", "--model", "{model}", "-p", "a", "--stop", ""), "a stop string is empty"),
        (("generate", "--model", "{model}", "-p", "a", "--temp", "1", "--top-k", "2048"), "less than the vocabulary"),
        (("generate", "--model", "{model}", "-p", "a", "--batch-size", "3"), "give --prompts-file"),
        (("chat", "-m", "{model}", "--no-prompt-cache", "--prompt-cache", "kept"), "contradicts keeping none"),
        (
            ("server", "-m", "{model}", "--port=0", "--no-prompt-cache", "--prompt-cache", "kept"),
            "contradicts keeping none",
        ),
        (("generate", "--model", "{model}", "-p", "a", "--prompt-cache-size", "5GB"), "give --prompt-cache"),
        (("generate", "--model", "{model}", "-p", "a", "--repetition-penalty", "0"), "repetition_penalty must be"),
        (("generate", "--model", "{model}"), "prompt is empty"),
        (("generate", "--model", "{model}", "--prompt", "pass\n" * 400), "context of 512"),
        (("generate", "--model", "{model}", "--prompt", "a", "--max-tokens", "0"), "--max-tokens"),
        (("generate", "--model", "{model}", "--prompt", "a", "--temp", "-1"), "--temp"),
        (("generate", "--model", "{model}", "--prompt", "a", "--top-p", "2"), "--top-p"),
        (("generate", "--model", "{model}", "--prompt", "a", "--kv-bits", "3"), "--kv-bits"),
        (("generate", "--model", "{model}", "--prompt", "a", "--seed", "-1"), "--seed"),
        (("inspect", "{model}", "--test-length", "1000000000000"), "--test-length"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(
    run: Any, stdlib_llama: Path, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    filled = [argument.format(model=stdlib_llama, new=tmp_path / "new") for argument in arguments]
    code, _, stderr = run(*filled)
    assert code == 2
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and stderr.splitlines()[-1] == errors[0] and named in errors[0]
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupted_is_130(run: Any, stdlib_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_resonance.checkpoint.resolve", interrupt)
    assert run("inspect", stdlib_llama) == (130, "", "error: interrupted\n")


def test_a_full_disk_is_1(run: Any, stdlib_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_resonance.convert.checkpoint.write_card", full)
    code, _, err = run("convert", stdlib_llama, "--mlx-path", tmp_path / "out")
    assert (code, err) == (1, f"error: {tmp_path / 'out'} cannot be written (No space left on device)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_prompt_that_is_not_utf8_is_named(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    code, _, err = run("generate", "--model", stdlib_llama, "--prompt-file", tmp_path / "prompt")
    assert code == 2 and "not UTF-8" in err
    code, _, err = run("generate", "--model", stdlib_llama, "--prompt", "caf\udce9")
    assert code == 2 and "not UTF-8" in err


def test_no_arguments_show_the_help(run: Any) -> None:
    code, out, err = run()
    assert (code, err) == (0, "") and "convert" in out and "Usage" in out


def test_the_installed_command_prints_its_version_and_help() -> None:
    command = Path(sys.executable).with_name("mlx-resonance")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split()[:2] == ["mlx-resonance", __import__("mlx_resonance").__version__]
    text = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in text for name in ("convert", "inspect", "generate", "demo"))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("plan", "{model}"), ("plan", "-m", "{model}")),
        (("inspect", "{model}"), ("inspect", "--model={model}")),
        (
            ("generate", "{model}", "-p", "a", "--max-tokens", "1"),
            ("generate", "--prompt=a", "-m", "{model}", "--max-tokens=1"),
        ),
    ],
)
def test_a_model_is_an_argument_or_an_option(run: Any, extended: Path, before: Any, after: Any) -> None:
    ends = [run(*(part.format(model=extended) for part in line)) for line in (before, after)]
    assert ends[0][:2] == ends[1][:2] and ends[0][0] == 0 and ends[0][1]
