"""The page of all commands and flags: python docs/commands.py docs/commands.md writes their own help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import cli

import typer

HEAD = """# Commands and flags

Written by `python docs/commands.py docs/commands.md`; a test compares the two.

`mlx-resonance --install-completion` makes bash, zsh or fish complete commands, flags, their choices and paths (in zsh
the first Tab of a session only loads it); `--show-completion` prints the script that does it. `mlx-resonance --version`
prints the versions and the device, for bug reports. A model is given with `-m`, or as the first argument.
"""


def helps(command: Any, context: Any) -> Iterator[tuple[str, str]]:
    """The full name and the help of every command below a group."""
    for name, part in getattr(command, "commands", {}).items():
        inner = type(context)(part, info_name=name, parent=context, terminal_width=80, max_content_width=80)
        if hasattr(part, "commands"):
            yield from helps(part, inner)
        else:
            yield inner.command_path, part.get_help(inner)


def page() -> str:
    """The whole page, in Markdown."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("mlx-resonance", [], resilient_parsing=True)
    texts = (f"\n## {name}\n\n```\n{text.strip()}\n```\n" for name, text in helps(command, context))
    return HEAD + "".join(texts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
