"""Every command in the README and the docs runs as it stands, in a folder that has what it names; or a reason is given.

The models are random and tiny, numbers that take hours are made small (`SMALL`), and what starts something that stays,
downloads, or takes a machine that is not here is in `NOT_RUN`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from .checkpoints import random_checkpoint, source
from .gguf_files import model_file
from .serving import TEMPLATE
from .test_docs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# After the command's own flags, of which the last one counts.
SMALL = {
    "generate": "--max-tokens 4",
    "chat": "--max-tokens 4",
    "eval perplexity": "--contexts 128,512 --stride 64",
    "eval leval": "--limit 1",
    "eval passkey": "--lengths 256 --repetitions 1",
    "finetune": "--preset paper-4k --length 32 --batch-size 1 --accumulate 1 --steps 1 --warmup 0 --factor 1.5",
    "posgen data": "--rows 20",
    "posgen train": "--preset smoke",
    "posgen sweep": "--preset smoke --seeds 1 --output posgen-learned.jsonl",
}
NOT_RUN = {
    "mlx-resonance server": "serves until it is stopped: tests/test_serve.py",
    "mlx-resonance lm server": "serves until it is stopped: tests/test_lm.py",
    "mlx-resonance eval harness": "downloads its data, or makes it for minutes: tests/test_harness.py",
    "mlx-resonance convert owner/repository": "downloads: tests/test_convert_hub.py has a hub",
    "mlx.launch": "several processes: tests/test_distributed.py",
    "mlx.distributed_config": "several Macs",
    "make": "the checks themselves",
    "pip": ".ci/check_dist.py installs into an environment of its own",
    "python benchmarks": "measures for minutes or hours: test_every_benchmark_in_a_page_takes_its_flags",
    "MLX_ENABLE_TF32=0": "the command with its options left out",
}
PYTHON = r"```python\n(.*?)```"


def lines(path: Path) -> list[str]:
    """The command lines in a page's blocks of code, each whole."""
    text = re.sub(PYTHON, "", path.read_text(encoding="utf-8"), flags=re.S)
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S) + re.findall(r"\n\n((?:    \S.*\n)+)", text)
    whole = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in whole.splitlines() if line.strip()]


def reason(line: str) -> str | None:
    """Why a line is not run."""
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def test_every_line_is_a_command_or_has_a_reason() -> None:
    found = [line for page in PAGES if page.name != "commands.md" for line in lines(page)]
    assert [line for line in found if not line.startswith("mlx-resonance ") and reason(line) is None] == []
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in found)] == []
    assert len(found) > 30


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with everything that the pages name, and a home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    for name in (
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "M",
        "BIG",
        "SRC",
        "MODEL",
    ):
        folder = random_checkpoint(tmp_path / name, 64, 64, 1, 1, 1, 2048, mx.float32)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    random_checkpoint(tmp_path / "smollm2-32k", 64, 64, 1, 1, 1, 2048, mx.float32, context=32768)
    (tmp_path / "smollm2-32k" / "chat_template.jinja").write_text(TEMPLATE)
    model_file(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf")
    for name in ("book.txt", "report.txt"):
        Path(name).write_text(source()[:4000])
    Path("books.jsonl").write_text(json.dumps({"text": source()[:4000]}) + "\n")
    Path("books").mkdir()
    Path("books", "train.jsonl").write_text(Path("books.jsonl").read_text())
    for name in ("coursera.jsonl", "quality.jsonl"):
        row = {"input": "A text.", "instructions": ["Q?"], "outputs": ["A"], "evaluation": "exam"}
        Path(name).write_text(json.dumps(row) + "\n")
    Path("prompts.jsonl").write_text(json.dumps({"id": "1", "prompt": "import os"}) + "\n")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "commands.md"], ids=lambda page: page.name)
def test_commands_run_as_they_stand(run: Any, place: Path, page: Path) -> None:
    for line in lines(page):
        if reason(line) is not None:
            continue
        words = shlex.split(line, comments=True)[1:]
        if "--mlx-path" in words:  # the lines of a block are alternatives
            shutil.rmtree(place / words[words.index("--mlx-path") + 1], ignore_errors=True)
        small = next(
            (flags for command, flags in SMALL.items() if words[: len(command.split())] == command.split()), ""
        )
        if "--dry-run" not in words:
            words += shlex.split(small)
        code, out, err = run(*words, stdin="Who killed him?\n")
        assert code == 0, f"{line}\n{out}\n{err}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_python_runs_as_it_stands(place: Path, page: Path) -> None:
    for code in re.findall(PYTHON, page.read_text(encoding="utf-8"), flags=re.S):
        exec(compile(code.replace("max_tokens=500", "max_tokens=5"), str(page), "exec"), {})


def test_every_benchmark_in_a_page_takes_its_flags() -> None:
    found = 0
    for page in PAGES:
        for script, options in re.findall(
            r"python (benchmarks/\w+\.py)([^`)\n]*(?:\n(?!python )[^`)\n]+)?)[`)\n]", page.read_text()
        ):
            text = (ROOT / script).read_text()
            for flag in re.findall(r"(?<!\S)--[a-z][a-z-]+", options):
                assert f'"{flag}"' in text, (page.name, script, flag)
                found += 1
    assert found > 20
