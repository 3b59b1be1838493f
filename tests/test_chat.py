"""`mlx-resonance chat`: questions from a pipe, commands, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_resonance.cli import chat
from mlx_resonance.cli.dialogue import path_of

import pytest

from .checkpoints import source
from .test_conversation import TEMPLATE

FIGURES = re.compile(r"prompt \d+ tokens, .* tokens/s; generated \d+ tokens, .* tokens/s; peak memory .*")


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    target = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


@pytest.fixture
def piped(folder: Path, run: Any) -> Any:
    """piped(text, option, …) -> exit code, stdout, stderr."""

    def piped(text: str, *options: object) -> tuple[int, str, str]:
        return run("chat", "-m", folder, "--no-prompt-cache", "--max-tokens", 8, *options, stdin=text)

    return piped


def test_a_question_per_line(piped: Any, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    code, out, err = piped(f"import os\n\nimport re\n/save {path}\n")
    assert code == 0
    messages = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [messages[0]["content"], messages[2]["content"]] == ["import os", "import re"]
    assert out == "".join(message["content"] + "\n" for message in messages[1::2])  # byte for byte
    lines = err.splitlines()
    assert "when the context of 512 tokens is full, no question is answered until /clear" in err
    figures = [line for line in lines if "generated" in line]
    assert FIGURES.match(figures[0])
    assert re.match(r"\d+ of \d+ prompt tokens from the cache, \d+ read at", figures[1])
    assert all(re.search(r"cut at 8 tokens; \d+ of 512 tokens of context used$", line) for line in figures)
    assert " 0 tokens/s" not in err


def test_files_and_a_system_prompt(piped: Any, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("a = 1\n")
    (tmp_path / "c.txt").write_text("c = 3\n")
    commands = [f"/file {tmp_path / 'c.txt'}", "What is a?", "/system Be brief.", f"/save {tmp_path / 'talk.json'}"]
    code, _, err = piped("\n".join(commands), "-f", tmp_path / "a b.txt", "--overflow", "drop-oldest")
    assert code == 0
    system, question, _ = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert question["content"] == "a = 1\n\nc = 3\n\nWhat is a?"
    assert "the oldest turns are dropped; the system prompt and files stay" in err


def test_clear_stats_and_help(piped: Any) -> None:
    lines = "import os\n/stats\n/clear\n/stats\n/help\n/system\n/system -\n/system\n"
    code, _, err = piped(lines, "--system-prompt", "Be brief.")
    assert code == 0
    assert err.rstrip().endswith("no system prompt") and "- removes it" in err
    assert re.search(r"context: \d+ of 512 tokens, 1 turn, 0 files", err)
    assert re.search(r"context: \d+ of 512 tokens, 0 turns, 0 files", err)
    assert "forgot turns and files; the system prompt stays" in err and "Be brief." in err
    assert "KV cache on disk: none" in err and "/file PATH" in err


def test_the_next_chat_finds_the_file_on_disk(folder: Path, run: Any, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(source()[:5000])
    command = ["chat", "-m", folder, "-f", tmp_path / "file.py", "--factor", 8, "--prompt-cache", tmp_path / "kept"]
    command += ["--max-tokens", 4]
    results = [run(*command, stdin="import os") for _ in range(2)]
    assert results[0][:2] == results[1][:2] and results[0][0] == 0
    entries = [path for path in (tmp_path / "kept").iterdir() if path.suffix == ".safetensors"]
    assert len(entries) == 1


def test_drop_oldest_goes_on_where_stop_ends(piped: Any) -> None:
    lines = "".join(f"{number} {'import re ' * 10}\n" for number in range(6))
    code, _, err = piped(lines, "--context", 128)
    assert code == 2 and 2 <= err.count("of context used") < 6
    last = err.splitlines()[-1]
    assert re.fullmatch(
        r"error: \d+ tokens of conversation and 8 for an answer exceed the context of 128: give --overflow drop-oldest",
        last,
    )
    code, _, err = piped(lines, "--context", 128, "--overflow", "drop-oldest")
    assert code == 0 and err.count("of context used") == 6 and "the context is full: dropped" in err


def test_a_base_checkpoint_says_so(checkpoint: Path, run: Any) -> None:
    code, _, err = run("chat", "-m", checkpoint, "--max-tokens", 2, "--no-prompt-cache", stdin="import os")
    assert code == 0 and "has no chat template: questions and answers are joined by blank lines" in err


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("/fiel x\n", [], "error: /fiel is not a command, but /file, /system, /clear, /save, /stats, /help are"),
        ("/file missing.txt\n", [], "error: missing.txt: no such file$"),  # it is about no flag
        ("/file\tmissing.txt\n", [], "error: missing.txt: no such file$"),
        ("/file -\n", [], "error: questions come from standard input: /file needs a file$"),
        ("/file a\0b\n", [], "error: no path has a NUL character in it$"),
        ("/clear now\n", [], "error: nothing may follow /clear$"),
        ("/help /file\n", [], "error: nothing may follow /help$"),
        ("/stats x\n", [], "error: nothing may follow /stats$"),
        ("/file\n", [], "error: /file needs a path"),
        ("/save x.json\n", [], "error: there is nothing to save yet"),
        ("import os\n/save missing/x.json\n", [], "error: missing: no such folder$"),
        ("import os\n/save binary\n", [], "error: binary exists: choose another name"),
        ("/file binary\n", [], "error: binary is not UTF-8 text"),
        ("/file long.txt\n", [], "give --factor"),
        ("x\n", ["-f", "missing.txt"], "error: missing.txt: no such file (--prompt-file)"),
        ("x\n", ["-f", "-"], "error: questions come from standard input"),
        ("x\n", ["--overflow", "forget"], "--overflow"),
        ("x\n", ["--top-k", "5000"], "error: top_k must be less than the vocabulary"),
        ("x\n", ["--stop", ""], "error: a stop string is empty"),
        ("x\n", ["--context", "100000"], "exceed the checkpoint's context of 512 tokens: give --factor"),
    ],
)
def test_wrong_requests(
    piped: Any, text: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("long.txt").write_text(source()[:20_000])
    code, _, err = piped(text, *options)
    assert code == 2
    assert message in err.splitlines()[-1] + "$"
    assert Path("binary").read_bytes() == b"\xff\xfe\x00" and not Path("x.json").exists()


def test_standard_input_that_is_not_text(folder: Path) -> None:
    command = [Path(sys.executable).with_name("mlx-resonance"), "chat", "-m", folder, "--no-prompt-cache"]
    result = subprocess.run(command, input=b"\xff\n", capture_output=True)
    assert result.returncode == 2 and b"error: standard input is not UTF-8 text" in result.stderr


def test_several_processes_have_no_terminal(piped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "processes", lambda: SimpleNamespace(size=2))
    assert piped("x")[::2] == (2, "error: a chat reads the terminal of one process, and there are several\n")


def test_paths_as_a_shell_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a b").touch()
    (tmp_path / "it's").touch()
    for text in (f"{tmp_path}/a b", f"'{tmp_path}/a b'", f"{tmp_path}/a\\ b"):
        assert path_of(text, "/file") == tmp_path / "a b"
    assert path_of(f"{tmp_path}/it's", "/file") == tmp_path / "it's"
    assert path_of("no such file", "/file") == Path("no such file")
    assert path_of("~/x", "/file") == Path.home() / "x"
