"""Run notebooks from top to bottom, each in a fresh kernel: python notebooks/run.py 01-….ipynb …

It fails if a cell fails, a committed figure does not appear, or the paired .py differs. The notebooks do not change,
unless --save writes the new outputs into them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FIGURES = ("image/png", "image/svg+xml")


def figures(cell: nbformat.NotebookNode) -> int:
    """The number of figures that a cell shows."""
    return sum(any(kind in output.get("data", {}) for kind in FIGURES) for output in cell.get("outputs", []))


def problems(path: Path, notebook: nbformat.NotebookNode, save: bool) -> list[str]:
    """Run a notebook; returns what is wrong."""
    found = []
    pair = jupytext.read(path.with_suffix(".py"))
    if [cell.source for cell in pair.cells] != [cell.source for cell in notebook.cells]:
        found.append(f"{path.with_suffix('.py').name} has other cells: jupytext --sync {path}")
    before = [figures(cell) for cell in notebook.cells]
    if not any(before) and not save:
        found.append("it has no figure")
    try:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    except CellExecutionError as error:
        return [*found, str(error)]
    for number, (cell, count) in enumerate(zip(notebook.cells, before, strict=True), 1):
        if figures(cell) < count:
            found.append(f"cell {number} shows {figures(cell)} figures instead of {count}")
        cell.metadata.pop("execution", None)  # times
    notebook.metadata.pop("widgets", None)  # pictures of the sliders, which a static figure follows
    if save:
        nbformat.write(notebook, path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--save", action="store_true", help="write the new outputs")
    args = parser.parse_args()
    failed = False
    for path in args.notebooks:
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        found = problems(path, notebook, args.save)
        seconds = time.perf_counter() - start
        count = sum(map(figures, notebook.cells))
        print(f"{path.name}: {len(notebook.cells)} cells, {count} figures, {seconds:.0f} s", flush=True)
        for problem in found:
            print(f"error: {path.name}: {problem}", file=sys.stderr)
        failed = failed or bool(found)
    sys.exit(failed)


if __name__ == "__main__":
    main()
