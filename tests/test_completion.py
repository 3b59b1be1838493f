"""Shell completion: what a shell is told after Tab, in its own protocol; and that telling it loads no MLX."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance.posgen.settings import ENCODINGS, PRESETS
from mlx_resonance.posgen.tasks import SUBTASKS

import pytest

COMMAND = Path(sys.executable).with_name("mlx-resonance")
COMPLETE = "_MLX_RESONANCE_COMPLETE"
COMMANDS = {
    "convert", "verify", "inspect", "plan", "generate", "chat", "finetune", "demo", "server", "lm", "cache", "posgen",
    "eval",
}  # fmt: skip


@pytest.fixture
def complete(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """complete(words…, beginning of the next) -> what bash may put there."""

    def complete(*words: str) -> set[str]:
        monkeypatch.setenv("COMP_WORDS", "\n".join(["mlx-resonance", *(word.replace(" ", r"\ ") for word in words)]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setenv(COMPLETE, "complete_bash")
        code, out, err = run()
        assert (code, err) == (0, "")
        return set(out.split())

    return complete


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("",), COMMANDS),
        (("ge",), {"generate"}),
        (("frobnicate", ""), COMMANDS),
        (("cache", ""), {"add", "list", "clear"}),
        (("posgen", "s"), {"sweep"}),
        (("--v",), {"--version"}),
        (("convert", "source", "--q-"), {"--q-bits", "--q-group-size", "--q-mode"}),
        (("convert", "--no-r"), {"--no-resonance"}),
        (("convert", "--rope", ""), {"linear", "ntk", "dynamic", "yarn"}),
        (("convert", "source", "--factor", "8", "--dtype", "f"), {"float32", "float16"}),
        (("generate", "-m", "a model", "--kv-bits", ""), {"8", "8,4", "4"}),
        (("posgen", "train", "--subtask", ""), set(SUBTASKS)),
        (("posgen", "train", "--encoding", ""), set(ENCODINGS)),
        (("posgen", "sweep", "--preset", ""), set(PRESETS)),
        (("demo", "--json", "--s"), {"--seed"}),
    ],
)
def test_commands_flags_and_choices(complete: Any, words: tuple[str, ...], expected: set[str]) -> None:
    assert complete(*words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "mod"), ("inspect", "-m", "mod"), ("chat", "-m", "mod"), ("chat", "mod"), ("convert", "mod"),
        ("convert", "a", "--mlx-path", "mod"), ("generate", "-m", "a", "-f", ""), ("server", "--model", ""),
    ],
)  # fmt: skip
def test_a_path_is_left_to_the_shell(complete: Any, words: tuple[str, ...]) -> None:
    """It knows folders, spaces and ~ best, and completes files wherever it is told nothing."""
    assert complete(*words) == set()


def test_nothing_is_read_or_run(complete: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complete("cache", "clear", "--folder", "x", "--j") == {"--json"}
    assert complete("convert", "no such folder", "--mlx-path", "out", "--dry-r") == {"--dry-run"}
    assert complete("generate", "-m", "x", "-f", "no such file", "--prompts-file", "nor this", "--see") == {"--seed"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"MLX_RESONANCE_BLAS": "libnothing.so"}])
def test_completing_loads_no_mlx_and_says_nothing_else(options: dict[str, str]) -> None:
    environment = os.environ | {COMPLETE: "complete_bash", "COMP_WORDS": "mlx-resonance eval pe", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND], env=environment | options, capture_output=True, text=True
    )  # fmt: skip
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert (done.returncode, done.stdout) == (0, "perplexity\n") and "typer" in imported
    assert [name for name in imported if name.split(".")[0] in ("mlx", "mlx_lm", "transformers", "torch")] == []
    assert [line for line in done.stderr.splitlines() if not line.startswith("import time:")] == []


def script(shell: str) -> str:
    """What --show-completion prints."""
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    arguments = [COMMAND, "--show-completion", shell]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout


def in_shell(*arguments: str) -> list[str]:
    """The words that a shell prints; mlx-resonance is on its path."""
    environment = os.environ | {"PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_bash() -> None:
    text = script("bash")
    ask = "COMP_WORDS=(mlx-resonance convert --rope ''); COMP_CWORD=3; _mlx_resonance_completion mlx-resonance"
    found = in_shell("bash", "--norc", "-c", f'{text}\n{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"; complete -p')
    assert found[:4] == ["linear", "ntk", "dynamic", "yarn"]
    assert " ".join(found[4:]) == "complete -o default -F _mlx_resonance_completion mlx-resonance"  # files, else


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    ask = f"cd {tmp_path}; {script('fish')}"
    assert in_shell("fish", "--no-config", "-c", f"{ask}; complete -C 'mlx-resonance convert --rope y'") == ["yarn"]
    assert in_shell("fish", "--no-config", "-c", f"{ask}; complete -C 'mlx-resonance inspect mod'") == ["models/"]


@pytest.mark.parametrize(("line", "told"), [("convert --rope y", "yarn"), ("inspect mod", "_files")])
def test_zsh_is_told_in_its_own_words(run: Any, line: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"mlx-resonance {line}")
    monkeypatch.setenv(COMPLETE, "complete_zsh")
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out.strip() == (told if told == "_files" else f"""_arguments '*: :(("{told}"))'""")


def test_installing_writes_into_the_home_folder_only(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("zsh", "/bin/zsh"))
    code, out, err = run("--install-completion")
    assert (code, err) == (0, "") and "zsh" in out
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".zshrc", "_mlx-resonance"}
