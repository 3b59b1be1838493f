"""What a command refuses, it refuses before it reads a weight: every command, with --force too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, plan_memory
from mlx_resonance.generation import memory

import mlx.core as mx
import pytest

from .checkpoints import random_checkpoint, source

CONTEXT = 2048
COMMANDS: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", "--prompt", "import os", "--max-tokens", 4),
    "batch": ("generate", "--prompts-file", "{lines}", "--output", "{new}", "--max-tokens", 4),
    "chat": ("chat", "--no-prompt-cache"),
    "server": ("server", "--port", 0, "--no-prompt-cache"),
    "cache": ("cache", "add", "{text}", "--prompt-cache", "{new}"),
    "perplexity": ("eval", "perplexity", "--data", "{text}", "--contexts", 64, "--stride", 16, "--output", "{new}"),
    "passkey": ("eval", "passkey", "--lengths", 300, "--repetitions", 1, "--output", "{new}"),
    "leval": ("eval", "leval", "--data", "{leval}", "--context", 500, "--output", "{new}"),
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What the commands read, and a place for what they write."""
    found = {
        name: tmp_path / f"{name}{end}" for name, end in (("text", ".txt"), ("lines", ".jsonl"), ("leval", ".jsonl"))
    }
    found["text"].write_text(source()[:4000])
    found["lines"].write_text(json.dumps({"id": "1", "prompt": "import os"}) + "\n")
    row = {"input": "A text.", "instructions": ["Q?"], "outputs": ["A"], "evaluation": "exam"}
    found["leval"].write_text(json.dumps(row) + "\n")
    return found | {"new": tmp_path / "new"}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        pytest.fail("the weights are read")

    monkeypatch.setattr(Checkpoint, "load", load)


def refused(run: Any, *words: Any) -> str:
    """The one line of a command that is refused."""
    code, out, err = run(*words)
    assert (code, out) == (2, "") and "Traceback" not in err, err
    last: str = err.splitlines()[-1]
    return last


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kv_format_that_the_heads_cannot_have(
    run: Any, files: dict[str, Path], tmp_path: Path, unread: None, name: str, force: tuple[str, ...]
) -> None:
    folder = random_checkpoint(tmp_path / "odd", 40, 64, 1, 1, 1, 2048, mx.float32)
    words = [str(word).format(**files) for word in COMMANDS[name]]
    error = refused(run, *words, "--model", folder, "--kv-bits", 8, *force)
    assert "40" in error and "32" in error and not files["new"].exists()


@pytest.mark.parametrize("name", ["perplexity", "passkey", "leval", "generate", "chat", "cache"])
def test_the_plan_counts_the_keys_that_a_position_map_moves(
    run: Any, files: dict[str, Path], checkpoint: Path, unread: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With a limit that holds the text as it is, and not every key a second time."""
    monkeypatch.setattr(memory, "usable", lambda budget: budget or 10**12)
    files["text"].write_text(source()[:8000])
    lengths = {
        "perplexity": ("--contexts", CONTEXT),
        "passkey": ("--lengths", CONTEXT),
        "leval": ("--context", CONTEXT),
    }
    lengths |= {"generate": ("--prompt-file", files["text"]), "chat": ("--context", CONTEXT)}
    words = [str(word).format(**files) for word in COMMANDS[name]]
    words = [*words, "--model", checkpoint, *lengths.get(name, ()), "--extend", "dynamic"]
    asked: list[Any] = []
    make = memory.plan_memory

    def plan(model: Any, context: Any = None, **options: Any) -> Any:
        asked.append((model.rope.positions is not None and context > model.rope.positions.unchanged, context))
        return make(model, context, **options)

    monkeypatch.setattr(memory, "plan_memory", plan)
    monkeypatch.setattr("mlx_resonance.generation.engine.plan_memory", plan)
    assert "need" in refused(run, *words, "--memory", "1MB")
    assert asked and all(mapped for mapped, context in asked if context > 512)
    assert any(context > 512 for _, context in asked)


LATE = {
    "a text too long": (("-f", "{text}"), "exceed"),
    "an empty stop string": (("--stop", ""), "stop"),
    "no place for a system prompt": (("--system-prompt", "x"), "no place for a system prompt"),
}


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("what", LATE)
def test_what_the_prompt_decides(
    run: Any, files: dict[str, Path], checkpoint: Path, unread: None, what: str, command: str
) -> None:
    files["text"].write_text(source()[:40000])
    flags, message = LATE[what]
    asked = () if command == "chat" else ("-p", "x")
    words = [flag.format(**files) for flag in flags]
    assert message in refused(run, *COMMANDS[command][:1], *asked, "-m", checkpoint, *words)


def test_a_failed_start_leaves_a_run_log_that_binds_nobody(
    run: Any, files: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    """What is only found in the weights: once they are right, the same command goes on with the same file."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    right = (folder / "config.json").read_text()
    words = [str(word).format(**files) for word in COMMANDS["passkey"]]
    (folder / "config.json").write_text(json.dumps(json.loads(right) | {"intermediate_size": 100}))
    assert run(*words, "-m", folder)[0] == 2
    (folder / "config.json").write_text(right)
    code, _, err = run(*words, "-m", folder)
    assert code == 0, err


def test_a_size_of_what_is_not_kept_is_refused(run: Any, checkpoint: Path, unread: None) -> None:
    for command in (("chat",), ("server", "--port", 0)):
        error = refused(run, *command, "-m", checkpoint, "--no-prompt-cache", "--prompt-cache-size", "5GB")
        assert "a size for the KV cache contradicts keeping none on disk" in error
    assert plan_memory(checkpoint, 64).fits


def test_an_evaluator_that_is_too_short_has_other_remedies(
    run: Any, files: dict[str, Path], checkpoint: Path, extended: Path, unread: None
) -> None:
    words = [str(word).format(**files) for word in COMMANDS["perplexity"]]
    error = refused(run, *words, "-m", extended, "--contexts", 1024, "--truncate", "--evaluator", checkpoint)
    assert error.endswith("give another --evaluator or --beyond") and "--factor" not in error
