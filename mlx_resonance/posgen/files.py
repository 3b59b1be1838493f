"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within it, a name beside `path` to write to: at the end it becomes `path`, after a fault it is gone."""
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """The name that `whole_file` gives, which a killed run may have left."""
    return path.with_suffix(f".partial{path.suffix}")
