"""Error messages: the one line that a command prints, with the flags that would fix it."""

from __future__ import annotations

import logging
import sys
from typing import Any, NoReturn

from typer.core import TyperCommand

from ..errors import ANOTHER, Remedy, UsageError

logger = logging.getLogger("mlx_resonance")


def fail(error: object, code: int) -> NoReturn:
    """Print one line on stderr and exit: 1 the work failed, 2 the request was wrong, 130 interrupted."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


class Command(TyperCommand):
    """A command that reports a user's mistake in one line that names this command's flags and no others."""

    def invoke(self, ctx: Any) -> Any:
        """Run it; warnings of the library go to stderr, a line each; the exit code of a UsageError."""
        warnings = _Warnings(self)
        logger.addHandler(warnings)
        try:
            return super().invoke(ctx)
        except UsageError as error:
            fail(in_words(error, self), error.exit_code)
        finally:
            logger.removeHandler(warnings)


class _Warnings(logging.Handler):
    """Prints each warning once, with the flags of a command for its remedies."""

    def __init__(self, command: Any) -> None:
        super().__init__(logging.WARNING)
        self.command, self.said = command, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        error = UsageError(record.getMessage(), remedies=getattr(record, "remedies", ()))
        line = " ".join(in_words(error, self.command).split())
        if line not in self.said:
            self.said.add(line)
            print("warning:", line, file=sys.stderr)


def in_words(error: UsageError, command: Any) -> str:
    """The message, with the remedies that the command has flags for, or else with the flag that it is about."""
    parameters = {parameter.name: parameter for parameter in command.params}
    ways = [_flags(way, parameters) for way in error.remedies if set(way) <= set(parameters)]
    if ways:
        return f"{error.message}: give {' or '.join(ways)}"
    about = parameters.get(error.option or "")
    return error.message if about is None else f"{error.message} ({_name(about)})"


def _flags(way: Remedy, parameters: dict[str, Any]) -> str:
    parts = []
    for name, value in way.items():
        parameter = parameters[name]
        if value is ANOTHER:
            parts.append(f"another {_name(parameter)}")
        elif isinstance(value, bool):
            off = parameter.secondary_opts[0] if parameter.secondary_opts else f"no {_name(parameter)}"
            parts.append(_name(parameter) if value else off)
        else:
            parts.append(_name(parameter) + ("" if value is None else f" {value}"))
    return " ".join(parts)


def _name(parameter: Any) -> str:
    """--flag, or the name of an argument."""
    flags = [flag for flag in parameter.opts if flag.startswith("--")]
    return flags[0] if flags else str(parameter.metavar or parameter.name.upper())
