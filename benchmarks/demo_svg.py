"""Record `mlx-resonance demo` as an SVG for the README.

    python benchmarks/demo_svg.py benchmarks/figures/demo.svg

The last line is one JSON object: seconds, and the demo's own figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from mlx_resonance.cli import main; main()", "demo"]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    seconds = round(time.perf_counter() - start, 1)
    *lines, last = done.stdout.decode().splitlines()
    lines = [line for line in lines if "━" not in line]  # a terminal has the bar only while it moves
    figures = json.loads(last)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text("$ mlx-resonance demo", style="bold"))
        console.print(Text.from_ansi("\n".join(lines)))
        console.print(Text(last[: 2 * WIDTH - 1] + "…"))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(console.export_svg(title="mlx-resonance demo"))
    print(json.dumps({"seconds": seconds} | {key: value for key, value in figures.items() if key != "text"}))


if __name__ == "__main__":
    main()
