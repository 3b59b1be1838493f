"""The pages say what the commands do: the page of flags is their own help, and every flag in a page exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

from mlx_resonance import cli

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.py"))]


def page_of_commands() -> Any:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def test_the_page_of_commands_is_their_help() -> None:
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == page_of_commands()


def command_lines(path: Path) -> list[list[str]]:
    """The command lines in a page's code, split."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:\s|[#$!]|\d)*(mlx-resonance [a-z].*)$", text, flags=re.M)
    return [shlex.split(line.split(" #")[0].replace("…", "x")) for line in found if "Usage" not in line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_in_a_page_exists(path: Path) -> None:
    for line in command_lines(path):
        command: Any = typer.main.get_command(cli.app)
        words = line[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        if command.name == "lm":
            continue
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        flags = {word for word in words if re.fullmatch(r"--[a-z-]+|-[a-z]", word)}
        assert not hasattr(command, "commands") and flags <= known, (line, flags - known)


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#: ]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
