"""A user's mistake: one class for all of them. The library says what is wrong; `cli/` names the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Remedy = Mapping[str, Any]
ANOTHER: Any = ...  # in a remedy: a value other than the one that was given


class UsageError(ValueError):
    """What was asked for cannot be done as asked.

    Args:
        message: one line: the thing, its value, what would be right. It names neither a flag nor a command.
        option: the parameter of the call that it is about.
        remedies: changes of the call that would make it right, the best one first. Each maps parameters to their new
            values; None for one that the user has to choose, `ANOTHER` for one that differs from what was given.
    """

    def __init__(self, message: str, *, option: str | None = None, remedies: Sequence[Remedy] = ()) -> None:
        super().__init__(message)
        self.message, self.option, self.remedies = message, option, tuple(remedies)

    def __str__(self) -> str:
        """The message and the remedies as arguments of a call."""
        ways = [
            ", ".join(f"{name}=…" if value in (None, ANOTHER) else f"{name}={value!r}" for name, value in way.items())
            for way in self.remedies
        ]
        return f"{self.message}: try {' or '.join(ways)}" if ways else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which does not know keyword arguments."""
        return _restore, (type(self), self.message, self.option, self.remedies)


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that was asked for is not there."""


class FileInTheWayError(UsageError, FileExistsError):
    """A file or folder is where the result should go."""


def check_option(name: str, right: bool, wanted: str, value: Any) -> None:
    """Raise UsageError, about the option, where its value is not `right`; `wanted` says what would be."""
    if not right:
        raise UsageError(f"{name} must be {wanted}, got {value}", option=name)


def _restore(kind: type[UsageError], message: str, option: str | None, remedies: Sequence[Remedy]) -> UsageError:
    return kind(message, option=option, remedies=remedies)
