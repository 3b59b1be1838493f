"""The pages match the commands: the page of flags has all of them, and every flag in a page exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import cli

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.py"))]


def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, with its full name."""
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def test_the_page_of_commands_has_every_flag_and_its_help() -> None:
    """The words, not the layout, which depends on Typer's version."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}
    expected = dict(commands(typer.main.get_command(cli.app), "mlx-resonance"))
    assert sections.keys() == expected.keys()
    for name, command in expected.items():
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        flags = {flag for flag in flags if flag.startswith("--")} | {"--help"}
        assert set(re.findall(r"(?<!\w)--[a-z][a-z-]+", sections[name])) >= flags, name
        for parameter in command.params:
            assert "".join((parameter.help or "").split()) in "".join(sections[name].split()), (name, parameter.name)


ASKS = (
    r"(is_available|default_device|device_info|uname|platform\.\w+|current_backend)\(|sys\.platform|mx\.gpu|DeviceType"
)


def files_that_ask(sources: dict[str, str]) -> set[str]:
    """The files that ask for the device or the system."""
    return {name for name, text in sources.items() if re.search(ASKS, text)}


def test_what_only_a_mac_runs_is_listed() -> None:
    folders = {"": ROOT / "mlx_resonance", "convert/": ROOT / "convert"}
    sources = {
        before + path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for before, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [table] = re.findall(r"## What only a Mac runs\n(.*?)\n## ", text, flags=re.S)
    listed = set(
        re.findall(r"`([a-z_/0-9]+\.py)`", "\n".join(row.split("|")[1] for row in table.splitlines() if "|" in row))
    )
    assert files_that_ask(sources) - listed == set()
    assert listed - sources.keys() == set()
    for named in re.findall(r"`((?:tests/)?[a-z_/0-9]*test_[a-z_0-9]+\.py)`", table):
        assert list((ROOT / "tests").rglob(named.removeprefix("tests/"))), named
    assert files_that_ask({"a": "if mx.metal.is_available():", "b": "x = 1"}) == {"a"}


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
