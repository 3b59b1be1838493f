"""Compare the memory plan with MLX's peak memory: models, contexts and KV formats.

    python benchmarks/memory.py

Random LLaMAs are made in a temporary folder; each is loaded, reads a prompt and generates two tokens. Last line: one
JSON object with the largest deviation.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

from mlx_resonance import load, plan_memory, stream_generate

import mlx.core as mx
from random_llama import make
from rich.console import Console
from rich.table import Table

# hidden, feed-forward, layers, heads, key heads, vocabulary, type
MODELS = {
    "15 MB": (256, 576, 5, 4, 2, 2048, mx.float32),
    "117 MB": (512, 1536, 8, 8, 4, 8192, mx.float32),
    "157 MB": (768, 2048, 6, 12, 4, 2048, mx.float32),
    "29 MB, bfloat16": (512, 1536, 4, 8, 8, 2048, mx.bfloat16),
}
CONTEXTS = ((1024, 512), (4096, 512), (4096, 2048), (8192, 256))  # tokens, and their maximum number in one pass


def measured(model: Any, tokenizer: Any, context: int, step: int, kv_bits: int | None) -> int:
    """MLX's peak memory in bytes while a prompt of `context` - 2 tokens is read and 2 tokens are generated."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    options = {"max_tokens": 2, "kv_bits": kv_bits, "prefill_step_size": step}
    for _ in stream_generate(model, tokenizer, [5] * (context - 2), **options):
        pass
    return mx.get_peak_memory()


def main() -> None:
    table = Table("model", "context", "step", "KV", "planned, MB", "measured, MB", "off")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in MODELS.items():
            path = make(Path(folder) / name.replace(" ", "-"), *shape)
            model, tokenizer = load(path)
            for context, step in CONTEXTS:
                if shape[-1] == mx.bfloat16 and mx.default_device() == mx.cpu and context > 4096:
                    continue  # 16-bit matrix products are slow on a CPU
                for kv_bits in (None, 8, 4):
                    planned = plan_memory(path, context, kv_bits=kv_bits, prefill_step_size=step).total
                    found = measured(model, tokenizer, context, step, kv_bits)
                    off = planned / found - 1
                    worst = max(worst, abs(off))
                    megabytes = (f"{size / 1e6:.0f}" for size in (planned, found))
                    table.add_row(name, str(context), str(step), str(kv_bits or 16), *megabytes, f"{off:+.1%}")
            del model
    Console().print(table)
    print(json.dumps({"mlx": mx.__version__, "device": str(mx.default_device()), "largest_deviation": round(worst, 4)}))


if __name__ == "__main__":
    main()
