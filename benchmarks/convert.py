"""Convert a checkpoint with mlx-lm and with us: seconds, peak memory, disk.

    python benchmarks/convert.py [--model build/smollm2 | --gigabytes 2] [--repeats 3] [--max-shard-size 500MB]

Without --model, a random LLaMA in float16 is made first. Each conversion is a process of its own; they take turns, and
the figures are medians. mlx-lm's files have at most 5 GB, which cannot be changed. Last line: one JSON object.
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
from reporting import exit_with, markdown

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


def random_source(folder: Path, gigabytes: float) -> Path:
    """A random LLaMA of about this size."""
    layers = max(1, round(gigabytes * 1e9 / 2 / LAYER))
    return make(folder, 2048, 5632, layers, 32, 32, 2048, mx.float16, tied=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint, as mlx-lm reads it; default: a random one")
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the random one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-shard-size", default="500MB")
    arguments = parser.parse_args()
    model = None if arguments.model is None else arguments.model.name
    report: dict[str, Any] = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, **vars(arguments), "model": model}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        src, out = arguments.model or random_source(Path(folder) / "source", arguments.gigabytes), Path(folder) / "out"
        report["source_mb"] = sum(path.stat().st_size for path in src.glob("*.safetensors")) / 1e6
        for kind, quantize in (("same type", False), ("4 bit", True)):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONVERT}
            for _ in range(arguments.repeats):
                for name, code in CONVERT.items():
                    filled = code.format(src=str(src), out=str(out), q=quantize, shard=arguments.max_shard_size)
                    runs[name].append(run(filled + MEASURE, out))
            for name, results in runs.items():
                medians = {key: round(statistics.median(r[key] for r in results), 1) for key in results[0]}
                report.setdefault(kind, {})[name] = medians
                rows.append((kind, name, *(f"{value:g}" for value in medians.values())))
    print(markdown(("conversion", "", "seconds", "peak memory, MB", "disk, MB"), rows))
    print(json.dumps(report))


if __name__ == "__main__":
    exit_with(main)
