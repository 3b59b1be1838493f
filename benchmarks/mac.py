"""Everything that a Mac can tell us, in three minutes: rotation, speed, memory, ours and mlx-lm's in turns.

    python benchmarks/mac.py [--minutes 3] [--model FOLDER] [--output FILE.json] [--quick]

Without --model: a LLaMA with random weights, made in a temporary folder; nothing is downloaded. Figures are medians of
several rounds, ratios medians of the rounds' ratios. mac_sections.py measures in a process of its own, which is started
again after a crash: a section that fails is a row that says so, and exit code 1. On stdout: a table for
docs/measurements.md, and one JSON object as the last line. Neither contains a path, nor the names of user and machine.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import Checkpoint
from mlx_resonance.storage import atomic_file, check_output

import mlx.core as mx
import mlx_lm
from reporting import exit_with, markdown

ROOT = Path(__file__).resolve().parents[1]
NEED_MODEL = ("speed", "kv_formats", "prompt_cache", "memory", "long_prompt")
SECTIONS = ("first_use", "kernel", "rotation", "angles", "model", *NEED_MODEL)
COLUMNS = ("chip", "measured", "ours", "compared with", "ours / other", "remarks")
INTERRUPTED = "interrupted"
GRACE = 120  # seconds past the time that is left, after which a section counts as hung


@dataclass(frozen=True)
class Row:
    """One figure: ours, what it is compared with, and the median of the rounds' ratios."""

    measured: str
    ours: float | None = None
    unit: str = ""
    other: float | None = None
    compared_with: str = ""
    ratio: float | None = None
    remarks: str = ""


def chip() -> str:
    """The chip's name."""
    if platform.system() == "Darwin":
        found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return str(mx.device_info().get("device_name", platform.machine()))


def commit() -> str | None:
    """The commit of this checkout, `-dirty` if it has changes; None if that is not known."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
        found = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "chip": chip(), "architecture": mx.device_info().get("architecture"), "device": str(mx.default_device()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system(),
        "python": platform.python_version(), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__,
        "mlx_resonance": mlx_resonance.__version__, "commit": commit(),
    }  # fmt: skip


def anonymous(value: Any) -> Any:
    """The same without paths and without the names of user and machine, all the way down."""
    if isinstance(value, dict):
        return {key: anonymous(part) for key, part in value.items()}
    if isinstance(value, list):
        return [anonymous(part) for part in value]
    if not isinstance(value, str):
        return value
    folders = {str(path) for folder in (ROOT, tempfile.gettempdir(), sys.prefix, Path.home())
               for path in (Path(folder), Path(folder).resolve()) if path != path.parent}  # fmt: skip
    for folder in sorted(folders, key=len, reverse=True):
        value = value.replace(folder, "…")
    value = re.sub(r"(?:[\w.~…+-]*/)+(?=[\w.+-])", lambda found: found[0] if found[0].count("/") < 2 else "…/", value)
    names = {platform.node(), platform.node().split(".")[0]}
    with contextlib.suppress(OSError, KeyError):  # a user without a name
        names.add(getpass.getuser())
    for name in sorted(names - {""}, key=len, reverse=True):
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", value)
    return value


def measure(command: Sequence[str], names: Sequence[str], seconds: float, results: Path) -> Iterator[dict[str, Any]]:
    """Measure sections with a command that appends a line to `results` for each of them; started again if it dies.

    Args:
        command: takes `--seconds`, then the sections' names.
        names: of the sections.
        seconds: the time for all.
        results: a file that does not exist yet.

    Yields:
        An object per section, in order.
    """
    deadline, left = time.monotonic() + seconds, list(names)
    while left:
        remaining, errors = max(0.0, deadline - time.monotonic()), results.with_suffix(".err")
        state, number, reason = "failed", 0, f"stopped after {remaining + GRACE:.0f} s without a result"
        with errors.open("w", encoding="utf-8") as file:
            try:
                full = [*command, "--seconds", f"{remaining:.1f}", *left]
                number = subprocess.run(full, stdout=2, stderr=file, timeout=remaining + GRACE).returncode
                end = signal.Signals(-number).name if number < 0 else f"exit code {number}"
                reason = f"the process ended with {end}"
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                state, number, reason = "skipped", 1, INTERRUPTED
        said = errors.read_text(encoding="utf-8", errors="replace")
        print(said, end="", file=sys.stderr)
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        results.unlink(missing_ok=True)
        yield from map(json.loads, lines)
        left = left[len(lines) :]
        if state == "failed":
            reason = ": ".join([reason, *[line for line in said.splitlines() if line.strip()][-1:]])
        for _ in left[: len(left) if number > 0 else 1]:  # a process that ends by itself would do so again
            yield {"section": left.pop(0), "state": state, "reason": reason, "seconds": None, "rows": []}


def rows_of(section: dict[str, Any]) -> Iterator[Row]:
    """The rows of a section in the table; messages, and what went wrong, are rows as well."""
    yield from (Row(**row) for row in section["rows"])
    for message in section.get("messages", ()):
        yield Row(f"{section['section']}: message", remarks=message)
    if section["state"] != "measured":
        yield Row(f"{section['section']}: {section['state']}", remarks=section["reason"])


def cells(name: str, row: Row) -> tuple[str, ...]:
    """A row of the table, for a chip."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    ours, other = ("" if value is None else f"{number(value)} {row.unit}".strip() for value in (row.ours, row.other))
    compared = ", ".join(filter(None, (other, row.compared_with)))
    remarks = " ".join(row.remarks.replace("|", "¦").split())
    remarks = remarks if len(remarks) <= 300 else f"{remarks[:299]}…"
    return name, row.measured, ours, compared, "" if row.ratio is None else f"{row.ratio:.3g}", remarks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="sections that would start later are skipped")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; default: random weights")
    parser.add_argument("--output", type=Path, help="file for the JSON object, too")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: only whether everything works")
    args = parser.parse_args()
    if args.output is not None:
        check_output(args.output)
    if args.model is not None:
        Checkpoint.open(args.model)  # a mistake is an error now
    sizes = "quick" if args.quick else "cpu" if mx.default_device() == mx.cpu else "gpu"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("mac_sections.py")), "--sizes", sizes]
        command += ["--folder", folder, "--results", str(Path(folder) / "results.jsonl")]
        command += [] if args.model is None else ["--model", str(args.model)]
        sections = list(measure(command, SECTIONS, 60 * args.minutes, Path(folder) / "results.jsonl"))
    report = machine() | {"sizes": sizes, "minutes": args.minutes, "seconds": round(time.monotonic() - start, 1)}
    report["sections"] = anonymous(sections)
    name = f"{report['chip']}, {report['memory_gb']} GB"
    print(markdown(COLUMNS, (cells(name, row) for section in report["sections"] for row in rows_of(section))))
    print(line := json.dumps(report, ensure_ascii=False))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.output) as partial:
            partial.write_text(f"{line}\n", encoding="utf-8")
    if any(section["reason"] == INTERRUPTED for section in sections):
        sys.exit(130)
    if any(section["state"] == "failed" for section in sections):
        sys.exit(1)


if __name__ == "__main__":
    exit_with(main)
