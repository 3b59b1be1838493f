"""Every command opens a checkpoint once: config.json, and the header of each weight file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mlx_resonance import convert, files

import pytest

from .checkpoints import source

OURS = (str(Path(files.__file__).parent), str(Path(convert.__file__).parent))
THEIRS = ("mlx_lm", "transformers", "huggingface_hub", "tokenizers")
opened: list[str] = []  # every config.json that our code opens


def note_open(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: a config.json counts as opened by the innermost caller that is ours or a library's."""
    if event == "open" and str(arguments[0]).endswith("config.json"):
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if any(f"/{library}/" in name for library in THEIRS):
                return
            if name.startswith(OURS):
                opened.append(str(arguments[0]))
                return
            frame = frame.f_back  # type: ignore[assignment]


sys.addaudithook(note_open)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The config.json files that our code opens from now on, and the weight files whose headers it reads."""
    opened.clear()
    safe_open = files.safe_open

    def count(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return safe_open(path, *args, **options)

    monkeypatch.setattr(files, "safe_open", count)
    return opened


COMMANDS: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", "-m", "{model}", "--prompt", "import os", "--max-tokens", 2),
    "generate with a cache": (
        "generate", "-m", "{model}", "--prompt", "import os", "--max-tokens", 2, "--prompt-cache", "{new}",
    ),
    "generate for a file": (
        "generate", "-m", "{model}", "--prompts-file", "{prompts}", "--output", "{new}.jsonl", "--max-tokens", 2,
    ),
    "plan": ("plan", "-m", "{model}", "--memory", "4GB"),
    "inspect": ("inspect", "{model}"),
    "convert": ("convert", "{model}", "--mlx-path", "{new}", "--verify"),
    "perplexity": (
        "eval", "perplexity", "-m", "{model}", "--data", "{text}", "--contexts", "32,64", "--stride", 16, "--output",
        "{new}.jsonl", "--rope", "default,resonance_yarn", "--factor", 8,
    ),
    "passkey": (
        "eval", "passkey", "-m", "{model}", "--lengths", 300, "--repetitions", 1, "--depths", 0, "--output",
        "{new}.jsonl", "--factor", 8,
    ),
    "finetune": (
        "finetune", "-m", "{model}", "--data", "{text}", "--mlx-path", "{new}", "--length", 64, "--steps", 1,
        "--accumulate", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_config_and_headers_are_read_once(
    name: str, checkpoint: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(source()[:2000])
    (tmp_path / "prompts.jsonl").write_text('{"id": 1, "prompt": "import os"}\n')
    places = {"model": checkpoint, "new": tmp_path / "new"}
    places |= {"text": tmp_path / "text.txt", "prompts": tmp_path / "prompts.jsonl"}
    read = counted(monkeypatch)
    code, _, err = run(*(str(part).format(**places) for part in COMMANDS[name]))
    assert code == 0, err
    for file in ("config.json", "model.safetensors"):
        assert read.count(str(checkpoint / file)) == 1, read
    results = [path for path in read if not path.startswith(str(checkpoint)) and not path.endswith("config.json")]
    assert len(set(results)) == len(results), read  # including the headers of a verified result
