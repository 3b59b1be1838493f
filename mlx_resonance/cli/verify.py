"""`mlx-resonance verify`: a converted checkpoint against its record and its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .convert import SRC, describe_checks
from .options import Json
from .options import path as path_parser
from .output import bytes_bar, print_json, stderr


def command(
    path: Annotated[Path, Argument(**path_parser, metavar="OUT", help="Folder that convert has written.")],
    source: Annotated[str | None, Option(**SRC, help="What it was made from, to compare with.")] = None,
    revision: Annotated[
        str | None, Option(help="Of SRC on the hub. Default: the commit on record; of another one, the latest.")
    ] = None,
    file: Annotated[str | None, Option(metavar="NAME", help="GGUF file of SRC, where it has several.")] = None,
    json: Json = False,
) -> None:
    """Check a converted checkpoint.

    Exit code 1 if something is not as it should be.
    """
    from ..convert import verify

    with bytes_bar() as bar:
        task = bar.add_task("verifying", total=None)
        found = verify(
            path,
            source,
            revision=revision,
            file=file,
            progress=lambda part, total: bar.update(task, completed=part, total=total),
        )
    for problem in found.problems:
        stderr.print(f"problem: {problem}", soft_wrap=True)
    if not found.problems:
        stderr.print(describe_checks(found.to_dict()), soft_wrap=True)
    if json:
        print_json({"path": str(found.path)} | found.to_dict())
    if found.problems:
        raise typer.Exit(1)
