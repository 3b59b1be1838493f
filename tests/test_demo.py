"""The demo: what it hides and finds, what it prints and leaves, and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.convert import convert
from mlx_resonance.demo import answers, converted, hide, ropes

import mlx.core as mx
import pytest

PLAIN, YARN, OURS = "plain RoPE, as trained", "YaRN", "Resonance-YaRN"


def test_demo_finds_the_number_only_with_yarn(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("demo", "--lengths", 2048)
    assert code == 0
    shown = {line.split("  ")[0]: line for line in out.splitlines() if line.startswith((PLAIN, YARN, OURS))}
    assert [("✓" in shown[name], "✗" in shown[name]) for name in (PLAIN, YARN, OURS)] == [
        (False, True),
        (True, False),
        (True, False),
    ]
    [statement] = [line for line in out.splitlines() if "Remember it." in line and "…" not in line and "✓" not in line]
    key = statement.split("The pass key is ")[1].split(".")[0]
    assert key.isdigit() and len(key) == 5 and f"✓ {key}" in shown[OURS]
    assert Checkpoint.open("stdlib-llama-8x").rope.context_length == 4096

    # What it says to type next works as it stands.
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  mlx-resonance ")]
    assert [command[1] for command in commands] == ["generate", "inspect", "plan"]
    assert [run(*command[1:])[0] for command in commands] == [0, 0, 0]
    assert Path("wavelengths.png").is_file()


def test_demo_json_is_one_object_and_the_folder_is_used_again(run: Any, tmp_path: Path) -> None:
    options = ("demo", "--lengths", "1024", "--mlx-path", tmp_path / "out", "--json", "--seed")
    results = []
    for seed in (3, 4):
        code, out, err = run(*options, seed)
        assert (code, out.count("\n")) == (0, 1) and "1,024" in err
        results.append(json.loads(out))
    written = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    for seed, result in zip((3, 4), results, strict=True):
        assert (result["seed"], result["mlx_path"]) == (seed, str(tmp_path / "out"))
        assert [answer["angles"] for answer in result["answers"]] == [PLAIN, YARN, OURS]
        for answer in result["answers"]:
            assert answer["length"] == 1024 and answer["found"] == answer["text"].lstrip().startswith(
                str(answer["key"])
            )
            assert answer["prompt_tokens"] == 1024 - 12
    assert results[0]["answers"][0]["key"] != results[1]["answers"][0]["key"]
    assert run(*options, 3)[0] == 0 and (tmp_path / "out" / "config.json").stat().st_mtime_ns == written


def test_the_folder_of_another_model_is_refused(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    """Folders of the same name and with the same angles: only the weights differ."""
    first, second = (shutil.copytree(stdlib_llama, tmp_path / name / "model") for name in "ab")
    weights: Any = mx.load(str(second / "model.safetensors"))
    mx.save_safetensors(
        str(second / "model.safetensors"), {name: value + 0.1 for name, value in weights.items()}, {"format": "pt"}
    )
    options = ("--lengths", 600, "--mlx-path", tmp_path / "out")
    assert run("demo", "-m", first, *options)[0] == 0
    code, out, err = run("demo", "-m", second, *options)
    assert (code, out) == (2, "") and "is not model with resonance_yarn, factor 8, with the same weights" in err
    assert "give another --mlx-path" in err
    shutil.rmtree(tmp_path / "out")
    convert(first, tmp_path / "out", rope="yarn", factor=8, quantize=True)
    code, out, err = run("demo", "-m", first, *options)
    assert (code, out) == (2, "") and "is not model with" in err


def test_the_demo_says_what_its_answers_show(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(stdlib_llama, tmp_path / "model")
    weights: Any = mx.load(str(model / "model.safetensors"))
    mx.save_safetensors(
        str(model / "model.safetensors"), {name: 0 * value for name, value in weights.items()}, {"format": "pt"}
    )
    code, out, err = run("demo", "-m", model, "--lengths", 600, "--mlx-path", tmp_path / "out")
    assert code == 0, err
    assert "With YaRN the model finds 0 of 2;" in out and "makes the longer context work" not in out


def test_a_context_past_all_measured_positions(run: Any, tmp_path: Path) -> None:
    code, out, err = run("demo", "--lengths", 600, "--factor", 65536, "--mlx-path", tmp_path / "out", "--json")
    assert code == 0 and out.count("\n") == 1, err
    code, out, err = run("inspect", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["test_length"] == 2**24, err


def test_demo_refuses_what_it_cannot_do(run: Any, extended: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time. " * 10)
    cases: tuple[tuple[tuple[Any, ...], str], ...] = (
        (
            ("--mlx-path", extended, "--factor", 4, "--lengths", 1024),
            "is not stdlib-llama with resonance_yarn, factor 4",
        ),
        (("--file", tmp_path / "short.txt", "--lengths", 1024), "fewer than 1,024"),
        (("--lengths", 8192), "context"),
        (("--lengths", 64), "no room for filler"),
        (("--file", tmp_path / "none.txt"), "none.txt"),
        (("--model", tmp_path / "none"), "none"),
    )
    for options, message in cases:
        options = options if "--mlx-path" in options else (*options, "--mlx-path", tmp_path / "out")
        code, _, err = run("demo", *options)
        assert code == 2 and message in err, (options, err)
        assert not (tmp_path / "out").exists(), options


@pytest.mark.long
def test_the_demo_holds_for_ten_seeds_of_key_and_text(stdlib_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(stdlib_llama)
    target = converted(source, tmp_path / "out", 8, "float32")
    tasks = [hide(source, 2048, None, seed) for seed in range(10)]
    assert len({task.key for task in tasks}) == 10 and len({tuple(task.prompt[:200]) for task in tasks}) == 10
    settings = ropes(source.rope, 8, 2048)
    found = [answer["found"] for answer in answers(target.load(), target, settings, tasks, lambda _: None)]
    assert found[:10] == [False] * 10 and found[20:] == [True] * 10
