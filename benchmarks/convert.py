"""Convert a random LLaMA of about 2 GB with mlx-lm and with us: seconds, peak memory, disk.

    python benchmarks/convert.py [--gigabytes 2] [--repeats 3] [--max-shard-size 500MB]

The checkpoint is made on the spot, in float16. Each conversion is a process of its own; they take turns, and the
figures are medians. mlx-lm's files are of 5 GB at most, which cannot be changed. Last line: one JSON object.
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

import mlx_resonance
from mlx_resonance.llama import Model, ModelArgs

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten, tree_map
from rich.console import Console
from rich.table import Table

TOKENIZER = Path(mlx_resonance.__file__).parent / "assets" / "stdlib-llama"
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
# Bytes. Linux hands the largest resident set of ru_maxrss down to the programs that a process starts; VmHWM is its own.
MEASURE = """
import re, resource, sys
if sys.platform == "linux":
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def make(folder: Path, gigabytes: float) -> int:
    """A LLaMA of random weights, in float16. Returns the bytes of its weights."""
    config = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
        "num_key_value_heads": 32, "num_hidden_layers": max(1, round(gigabytes * 1e9 / 2 / LAYER)), "vocab_size": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda value: value.astype(mx.float16), model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    return (folder / "model.safetensors").stat().st_size


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
        report["source_mb"] = make(src, arguments.gigabytes) / 1e6
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
