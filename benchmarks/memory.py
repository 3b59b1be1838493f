"""The memory that `plan` predicts beside what MLX measures: models, contexts and KV formats.

    python benchmarks/memory.py

Random LLaMAs are made in a temporary folder; each is loaded, a prompt is read and two tokens are written. Last line:
one JSON object with the largest deviation.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import load, plan_memory, stream_generate
from mlx_resonance.llama import Model, ModelArgs

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from rich.console import Console
from rich.table import Table

ASSETS = Path(mlx_resonance.__file__).parent / "assets" / "stdlib-llama"
# hidden, feed-forward, layers, heads, key heads, vocabulary, type
MODELS = {
    "15 MB": (256, 576, 5, 4, 2, 2048, mx.float32),
    "117 MB": (512, 1536, 8, 8, 4, 8192, mx.float32),
    "157 MB": (768, 2048, 6, 12, 4, 2048, mx.float32),
    "29 MB, bfloat16": (512, 1536, 4, 8, 8, 2048, mx.bfloat16),
}
CONTEXTS = ((1024, 512), (4096, 512), (4096, 2048), (8192, 256))  # tokens, and most of them in one pass


def make(folder: Path, shape: tuple[Any, ...]) -> Path:
    """A random LLaMA with the tokenizer of stdlib-llama."""
    hidden, feed_forward, layers, heads, kv_heads, vocabulary, dtype = shape
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 16384, "tie_word_embeddings": True,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / name)
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def measured(model: Any, tokenizer: Any, context: int, step: int, kv_bits: int | None) -> int:
    """The most bytes that MLX held while a prompt of `context` - 2 tokens was read and 2 were written."""
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
            path = make(Path(folder) / name.replace(" ", "-"), shape)
            model, tokenizer = load(path)
            for context, step in CONTEXTS:
                if shape[-1] == mx.bfloat16 and mx.default_device() == mx.cpu and context > 4096:
                    continue  # 16-bit matrix products are slow on a CPU
                for kv_bits in (None, 8, 4):
                    planned = plan_memory(path, context, kv_bits=kv_bits, prefill_step_size=step).total
                    found = measured(model, tokenizer, context, step, kv_bits)
                    off = planned / found - 1
                    worst = max(worst, abs(off))
                    row = (
                        name,
                        context,
                        step,
                        kv_bits or 16,
                        f"{planned / 1e6:.0f}",
                        f"{found / 1e6:.0f}",
                        f"{off:+.1%}",
                    )
                    table.add_row(*map(str, row))
            del model
    Console().print(table)
    print(json.dumps({"mlx": mx.__version__, "device": str(mx.default_device()), "largest_deviation": round(worst, 4)}))


if __name__ == "__main__":
    main()
