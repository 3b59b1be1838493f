"""Error messages: the one line that a command prints, with the flags that would fix it."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, NoReturn

from typer.core import TyperCommand

from ..errors import ANOTHER, Remedy, UsageError
from .output import stderr

logger = logging.getLogger("mlx_resonance")
# Of remedies for a text that is too long, where there is a choice.
COSTS = {
    "factor": " (which changes the angles of short texts, too)",
    "extend": " (which keeps every angle; a longer text holds its keys twice)",
}


def fail(error: object, code: int) -> NoReturn:
    """Print one line on stderr and exit: 1 the work failed, 2 the request was wrong, 130 interrupted."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


class Command(TyperCommand):
    """A command that reports a user's mistake in one line that names this command's flags and no others."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; a model may be an argument or follow -m, whatever the command declares."""
        return super().parse_args(ctx, _model_either_way(args, self))

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


def _model_either_way(arguments: list[str], command: Any) -> list[str]:
    """A command line that gives the model as the command declares it: as its argument, or with -m or --model.

    Args:
        arguments: of the command.
        command: one that may have the parameter `model`.
    """
    model = next((parameter for parameter in command.params if parameter.name == "model"), None)
    if model is None:
        return arguments
    if model.param_type_name == "option":
        others = any(parameter.param_type_name == "argument" for parameter in command.params)
        named = any(re.match(r"-m|--model(=|$)", part) for part in arguments)
        first = bool(arguments) and not arguments[0].startswith("-")
        return ["--model", *arguments] if first and not (named or others) else arguments
    for place, part in enumerate(arguments):
        if part in ("-m", "--model") and place + 1 < len(arguments):
            return [*arguments[:place], arguments[place + 1], *arguments[place + 2 :]]
        if part.startswith("--model="):
            return [*arguments[:place], part.partition("=")[2], *arguments[place + 1 :]]
    return arguments


class _Warnings(logging.Handler):
    """Prints each warning once, with the flags of a command for its remedies."""

    def __init__(self, command: Any) -> None:
        super().__init__(logging.WARNING)
        self.command, self.said = command, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line; a terminal's are wrapped at words."""
        error = UsageError(record.getMessage(), remedies=getattr(record, "remedies", ()))
        line = " ".join(in_words(error, self.command).split())
        if line not in self.said:
            self.said.add(line)
            stderr.print(f"warning: {line}", emoji=False, soft_wrap=not stderr.is_terminal)


def in_words(error: UsageError, command: Any) -> str:
    """The message, with the remedies that the command has flags for, or else with the flag that it is about."""
    parameters = {parameter.name: parameter for parameter in command.params}
    ways = {_flags(way, parameters): way for way in error.remedies if set(way) <= set(parameters)}
    if ways:
        costs = COSTS if COSTS.keys() <= {name for way in ways.values() for name in way} else {}
        said = [flags + "".join(costs.get(name, "") for name in way) for flags, way in ways.items()]
        return f"{error.message}: give {' or '.join(said)}"
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
