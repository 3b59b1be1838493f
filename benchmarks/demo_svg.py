"""Record `mlx-resonance demo` as an SVG for the README.

    python benchmarks/demo_svg.py benchmarks/figures/demo.svg

The last line is the demo's JSON object.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from mlx_resonance.cli import main; main()", "demo", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, check=True, cwd=folder)
    # A terminal has the bar only while it moves; without it, lines of control codes are left.
    lines = [line for line in done.stderr.decode().splitlines() if "━" not in line and "[ResonanceRoPE]" not in line]
    lines = ["" if not CODES.sub("", line).strip() else line for line in lines]
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text("$ mlx-resonance demo", style="bold"))
        console.print(Text.from_ansi(re.sub("\n\n\n+", "\n\n", "\n".join(lines))))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(console.export_svg(title="mlx-resonance demo"))
    print(done.stdout.decode().strip())


if __name__ == "__main__":
    main()
