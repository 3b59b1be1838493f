"""A user's mistake: one class, no flag in the library, and a message with the flags of the command that runs."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import cli
from mlx_resonance.cli.errors import in_words
from mlx_resonance.errors import ANOTHER, FileInTheWayError, MissingFileError, UsageError, check_option

import pytest
import typer

PACKAGE = Path(mlx_resonance.__file__).parent
CONVERT = PACKAGE.parent / "convert"
LIBRARY = [path for path in (*PACKAGE.rglob("*.py"), *CONVERT.rglob("*.py")) if "cli" not in path.parts]


def commands(group: Any = None, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its name."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*names, name))
        else:
            yield " ".join((*names, name)), command


COMMANDS = dict(commands())


def test_it_is_a_value_error_and_keeps_its_parts() -> None:
    error = UsageError("too long", option="length", remedies=[{"factor": 8}, {"kv_bits": 4, "output": ANOTHER}])
    assert isinstance(error, ValueError)
    assert str(error) == "too long: try factor=8 or kv_bits=4, output=…"
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(twin), str(twin), twin.option, twin.remedies) == (UsageError, str(error), "length", error.remedies)
    assert str(UsageError("wrong", option="length")) == "wrong"


def test_paths_are_file_errors_too() -> None:
    assert isinstance(MissingFileError("x"), FileNotFoundError) and isinstance(MissingFileError("x"), UsageError)
    error = FileInTheWayError("x exists", remedies=[{"mlx_path": ANOTHER}])
    assert isinstance(error, FileExistsError) and str(error) == "x exists: try mlx_path=…"


def test_check_option() -> None:
    check_option("steps", True, "at least 1", 1)
    with pytest.raises(UsageError, match=r"^steps must be at least 1, got 0$") as error:
        check_option("steps", False, "at least 1", 0)
    assert error.value.option == "steps"


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        ("generate", UsageError("a", remedies=[{"factor": 8}]), "a: give --factor 8"),
        ("generate", UsageError("a", remedies=[{"kv_bits": 8}, {"force": True}]), "a: give --kv-bits 8 or --force"),
        ("plan", UsageError("a", remedies=[{"kv_bits": 8}, {"force": True}]), "a: give --kv-bits 8"),
        ("inspect", UsageError("a", remedies=[{"kv_bits": 8}]), "a"),
        ("inspect", UsageError("a", option="train_length", remedies=[{"kv_bits": 8}]), "a (--train-length)"),
        ("convert", UsageError("a", remedies=[{"resonance": False}]), "a: give --no-resonance"),
        ("convert", UsageError("a", remedies=[{"rope": None, "factor": 2.0}]), "a: give --rope --factor 2.0"),
        ("convert", FileInTheWayError("a", remedies=[{"mlx_path": ANOTHER}]), "a: give another --mlx-path"),
        ("generate", UsageError("a", option="no_such_parameter"), "a"),
    ],
)
def test_words_name_the_flags_of_the_command(command: str, error: UsageError, words: str) -> None:
    assert in_words(error, COMMANDS[command]) == words


def test_every_command_puts_mistakes_into_words() -> None:
    assert {type(command).__name__ for command in COMMANDS.values()} == {"Command"} and len(COMMANDS) > 12


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """All string literals but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    bodies += [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    skipped = {id(part.value) for body in bodies for part in body if isinstance(part, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_library_names_no_flag_and_no_command(path: Path) -> None:
    names = {name.split()[-1] for name in COMMANDS} | {"load", "eval", "posgen"}
    for node in strings(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path}:{node.lineno}: {node.value}"
        if "mlx-resonance " not in node.value:  # a command line for the reader of a model card
            assert not re.search(r"(?<![\w-])--[a-z]", node.value), where
        assert not any(f"[{name}] " in node.value for name in names), where


def test_options_and_remedies_are_parameters_of_commands() -> None:
    """A misspelt one would silently not be shown."""
    known = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    found = set()
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("option", "remedies"):
                keys = [key for part in ast.walk(node.value) if isinstance(part, ast.Dict) for key in part.keys]
                keys += [node.value] if node.arg == "option" else []
                found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    assert len(found) > 20 and found <= known, found - known
