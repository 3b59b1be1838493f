"""Convert a random LLaMA of about 2 GB with mlx-lm and with us: seconds, peak memory, disk.

    python benchmarks/convert.py [--gigabytes 2] [--repeats 3] [--max-shard-size 500MB]

The checkpoint is made first, in float16. Each conversion is a process of its own; they take turns, and the figures are
medians. mlx-lm's files have at most 5 GB, which cannot be changed. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_resonance  # noqa: F401  (loads a fast BLAS on Linux, before MLX)

import mlx.core as mx
import mlx_lm
from random_llama import make
from rich.console import Console
from rich.table import Table

LAYER = 4 * 2048**2 + 3 * 2048 * 5632  # weights of a layer of TinyLlama's shape
CONVERT = {
    "ours": """
from mlx_resonance.convert import convert
convert({src!r}, {out!r}, quantize={q}, max_shard_size={shard!r})
""",
    "mlx_lm": """
import mlx_resonance
from mlx_lm import convert
convert({src!r}, {out!r}, quantize={q})
""",
}
# Bytes. On Linux a process inherits the largest resident set of ru_maxrss from the one that starts it; not VmHWM.
MEASURE = """
import re, resource, sys
if sys.platform == "linux":
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def run(code: str, out: Path) -> dict[str, float]:
    """Convert in a process of its own. Returns seconds, MB of peak memory and of the result."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    peak = int(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_memory_mb": peak / 1e6, "disk_mb": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-shard-size", default="500MB")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, **vars(arguments)}
    table = Table("conversion", "", "seconds", "peak memory, MB", "disk, MB")
    with tempfile.TemporaryDirectory() as folder:
        src, out = Path(folder) / "source", Path(folder) / "out"
        layers = max(1, round(arguments.gigabytes * 1e9 / 2 / LAYER))
        make(src, 2048, 5632, layers, 32, 32, 2048, mx.float16, tied=False)
        report["source_mb"] = (src / "model.safetensors").stat().st_size / 1e6
        for kind, quantize in (("float16", False), ("4 bit", True)):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONVERT}
            for _ in range(arguments.repeats):
                for name, code in CONVERT.items():
                    filled = code.format(src=str(src), out=str(out), q=quantize, shard=arguments.max_shard_size)
                    runs[name].append(run(filled + MEASURE, out))
            for name, results in runs.items():
                medians = {key: round(statistics.median(r[key] for r in results), 1) for key in results[0]}
                report.setdefault(kind, {})[name] = medians
                table.add_row(kind, name, *(f"{value:g}" for value in medians.values()))
    Console().print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
