"""Compare the memory plan with MLX's peak memory: models, contexts and KV formats.

    python benchmarks/memory.py [--model build/smollm2-32k] [--contexts 1024,4096,8192]

Without --model, random LLaMAs are made in a temporary folder. Each model is loaded, reads a prompt and generates two
tokens. Last line: one JSON object with the largest deviation.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, plan_memory, stream_generate

import mlx.core as mx
from random_llama import make
from reporting import exit_with, markdown

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
    for _ in stream_generate(model, tokenizer, [5] * (context - 2), prompt_lookup="off", **options):
        pass
    return mx.get_peak_memory()


def checkpoints(model: Path | None, folder: Path) -> Iterator[Checkpoint]:
    """The model, or the random ones, made one after another."""
    if model is not None:
        yield Checkpoint.open(model)
    else:
        for name, shape in MODELS.items():
            yield Checkpoint.open(make(folder / name.replace(" ", "-"), *shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; default: random ones")
    parser.add_argument("--contexts", default="1024,4096,8192", help="tokens, separated by commas")
    args = parser.parse_args()
    wanted = [int(part) for part in args.contexts.split(",")]
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in checkpoints(args.model, Path(folder)):
            model, tokenizer = checkpoint.load(), checkpoint.tokenizer
            own = 8 * checkpoint.dimensions.item_size
            for context, step in (pair for pair in CONTEXTS if pair[0] in wanted):
                if own == 16 and mx.default_device() == mx.cpu and context > 4096:
                    continue  # 16-bit matrix products are slow on a CPU
                for kv_bits in (None, 8, 4):
                    planned = plan_memory(checkpoint, context, kv_bits=kv_bits, prefill_step_size=step).total
                    found = measured(model, tokenizer, context, step, kv_bits)
                    worst = max(worst, abs(planned / found - 1))
                    sizes = (f"{size / 1e6:,.0f}" for size in (planned, found))
                    rows.append(
                        (checkpoint.folder.name, context, step, kv_bits or own, *sizes, f"{planned / found - 1:+.1%}")
                    )
            del model
    print(markdown(("model", "context", "step", "bits of keys and values", "planned, MB", "measured, MB", "off"), rows))
    report = {"mlx": mx.__version__, "device": str(mx.default_device())}
    print(json.dumps(report | {"measured": len(rows), "largest_deviation": round(worst, 4)}))


if __name__ == "__main__":
    exit_with(main)
