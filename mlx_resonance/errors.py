"""One error class for every mistake of a user: the library says what is wrong, `cli/` names the flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Remedy = Mapping[str, Any]
ANOTHER: Any = ...  # in a remedy: a value other than the one given


class UsageError(ValueError):
    """A request that cannot be carried out as given.

    Args:
        message: one line: the thing, its value, what would be right. It names neither a flag nor a command.
        option: the parameter that the message is about.
        remedies: changes to the call that would make it right, best first. Each maps parameters to their new values:
            None for one that the user has to choose, `ANOTHER` for one that differs from the value given.
    """

    exit_code = 2  # of a command

    def __init__(self, message: str, *, option: str | None = None, remedies: Sequence[Remedy] = ()) -> None:
        super().__init__(message)
        self.message, self.option, self.remedies = message, option, tuple(remedies)

    def __str__(self) -> str:
        """The message, with the remedies as arguments of a call."""
        ways = [
            ", ".join(f"{name}=…" if value in (None, ANOTHER) else f"{name}={value!r}" for name, value in way.items())
            for way in self.remedies
        ]
        return f"{self.message}: try {' or '.join(ways)}" if ways else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which does not pass keyword arguments."""
        return _restore, (type(self), self.message, self.option, self.remedies)


class MissingFileError(UsageError, FileNotFoundError):
    """A requested file or folder does not exist."""


class DeviceError(UsageError):
    """The GPU did not carry out what it was asked to do: the work failed, and a remedy may help."""

    exit_code = 1


class FileInTheWayError(UsageError, FileExistsError):
    """A file or folder is in the way of the result."""


def check_option(name: str, right: bool, wanted: str, value: Any) -> None:
    """Raise UsageError about the option `name` unless its value is `right`; `wanted` says what would be."""
    if not right:
        raise UsageError(f"{name} must be {wanted}, got {value}", option=name)


def _restore(kind: type[UsageError], message: str, option: str | None, remedies: Sequence[Remedy]) -> UsageError:
    return kind(message, option=option, remedies=remedies)
