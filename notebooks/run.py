"""Run notebooks, each in a fresh kernel: python notebooks/run.py 01-….ipynb …

After the last cell the kernel runs the notebook's checks, `checks/01_….py`, in a cell
that is not stored. It fails if a cell or a check fails, a committed figure does not
appear or has no alt text, a line is too long, a cell asserts, or the paired .py
differs. The notebooks do not change, unless --save writes the new outputs into them.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FIGURES = ("image/png", "image/svg+xml")
WIDTH = 88  # columns of a cell


def figures(cell: nbformat.NotebookNode) -> int:
    """The number of figures that a cell shows."""
    return sum(
        any(kind in output.get("data", {}) for kind in FIGURES)
        for output in cell.get("outputs", [])
    )


def check_name(path: Path) -> str:
    """The module with a notebook's checks."""
    return path.stem.replace("-", "_")


def problems_of_cells(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong before anything runs."""
    found = []
    pair = jupytext.read(path.with_suffix(".py"))
    if [cell.source for cell in pair.cells] != [cell.source for cell in notebook.cells]:
        found.append(
            f"{path.with_suffix('.py').name} has other cells: jupytext --sync {path}"
        )
    if not (path.parent / "checks" / f"{check_name(path)}.py").exists():
        found.append(f"checks/{check_name(path)}.py is not there")
    for number, cell in enumerate(notebook.cells, 1):
        longest = max(map(len, cell.source.splitlines()), default=0)
        if longest > WIDTH:
            found.append(f"cell {number} has {longest} columns, at most {WIDTH} fit")
        tree = ast.parse(cell.source if cell.cell_type == "code" else "")
        if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            found.append(f"cell {number} asserts: that belongs into checks/")
    return found


def problems_of_figures(
    notebook: nbformat.NotebookNode, before: list[int]
) -> list[str]:
    """What is wrong with the figures; `before` are their numbers when committed."""
    found = []
    for number, (cell, count) in enumerate(zip(notebook.cells, before, strict=True), 1):
        if figures(cell) < count:
            found.append(
                f"cell {number} shows {figures(cell)} figures instead of {count}"
            )
        for output in cell.get("outputs", []):
            kinds = [kind for kind in FIGURES if kind in output.get("data", {})]
            if not all(output.metadata.get(kind, {}).get("alt") for kind in kinds):
                found.append(f"cell {number} shows a figure without alt text")
    return found if any(map(figures, notebook.cells)) else [*found, "it has no figure"]


def problems(path: Path, notebook: nbformat.NotebookNode, save: bool) -> list[str]:
    """Run a notebook; returns what is wrong."""
    found = problems_of_cells(path, notebook)
    before = [0 if save else figures(cell) for cell in notebook.cells]
    check = f"from checks import run\nrun({check_name(path)!r}, globals())"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    try:
        how = {"timeout": 600, "coalesce_streams": True}  # one output for many prints
        place = {"metadata": {"path": path.parent}}
        NotebookClient(notebook, resources=place, **how).execute()
    except CellExecutionError as error:
        last = notebook.cells[-1].outputs
        if not any(output.output_type == "error" for output in last):
            return [*found, str(error)]
        found += error.evalue.splitlines()
    notebook.cells.pop()
    found += problems_of_figures(notebook, before)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    notebook.metadata.pop("widgets", None)  # sliders as pictures; a figure follows them
    if save:
        nbformat.write(notebook, path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--save", action="store_true", help="write the new outputs")
    parser.add_argument("--real", action="store_true", help="use SmolLM2: minutes")
    args = parser.parse_args()
    if not args.real:
        os.environ["NOTEBOOK_TINY"] = "1"
    failed = False
    for path in args.notebooks:
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        found = problems(path, notebook, args.save)
        seconds = time.perf_counter() - start
        count = sum(map(figures, notebook.cells))
        size = f"{len(notebook.cells)} cells, {count} figures"
        print(f"{path.name}: {size}, {seconds:.0f} s", flush=True)
        for problem in found:
            print(f"error: {path.name}: {problem}", file=sys.stderr)
        failed = failed or bool(found)
    sys.exit(failed)


if __name__ == "__main__":
    main()
