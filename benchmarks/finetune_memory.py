"""The memory plan of fine-tuning against the measured peak: random LLaMAs of several shapes, or a checkpoint (--model).

Prints the plans of two large models, the table, and as its last line one JSON object. On a CPU it takes some minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.files import TensorInfo
from mlx_resonance.finetuning import Recipe, finetune
from mlx_resonance.finetuning.memory import plan_training

import mlx.core as mx
from mlx.utils import tree_flatten
from random_llama import make
from reporting import exit_with, markdown

# hidden, feed-forward, layers, heads, key heads, vocabulary, type
MODELS = {
    "15 MB": (256, 576, 5, 4, 2, 2048, mx.float32),
    "50 MB, wide": (512, 1536, 4, 8, 8, 4096, mx.float32),
    "43 MB, large vocabulary": (256, 704, 3, 4, 4, 32_000, mx.float32),
    "44 MB, deep": (192, 512, 24, 3, 3, 2048, mx.float32),
    "8 MB, float16": (256, 576, 5, 4, 2, 2048, mx.float16),
    "8 MB, bfloat16": (256, 576, 5, 4, 2, 2048, mx.bfloat16),
}
LARGE = {  # the same, whose weights are float16 and never made
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32_000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128_256),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"fine_tune_type": "full"},
    "lora": {"fine_tune_type": "lora"},
    "4 bits": {"q_bits": 4},
}
CHANGES = ({"length": 3072}, {"accumulate": 2}, {"batch_size": 3}, {"num_layers": 2})
LENGTHS = (128, 512, 1024)
TEXT = "def name(argument):\n    return argument\n" * 4000


def measured(model: Path, recipe: dict[str, Any]) -> int:
    """MLX's peak memory in bytes of a run of two steps, the result included."""
    gc.collect()
    mx.clear_cache()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(TEXT)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        finetune(model, text, Path(folder) / "out", force=True, **recipe)
        return mx.get_peak_memory() - before


def runs(name: str | None, slow: bool) -> list[dict[str, Any]]:
    """The recipes to run a model with: on a CPU, few and short ones for 16-bit types and quantized weights."""
    cpu = mx.default_device() == mx.cpu
    grid = []
    for kind in ["lora"] if slow and cpu else KINDS:
        lengths = LENGTHS[:1] if cpu and (slow or "q_bits" in KINDS[kind]) else LENGTHS[: None if name else 2]
        grid += [KINDS[kind] | {"length": length, "grad_checkpoint": on} for length in lengths for on in (True, False)]
    if name == "15 MB":
        some = [KINDS[kind] | {"length": 512} for kind in ("full", "lora")]
        grid += [recipe | change for recipe in some for change in CHANGES]
    return [recipe | {"steps": 2} for recipe in ({"accumulate": 1} | recipe for recipe in grid)]


def compare(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A row: the recipe, the planned and the measured bytes."""
    names = {entry.name for entry in fields(Recipe)}
    kind = recipe | {"fine_tune_type": recipe.get("fine_tune_type", "lora")}
    plan = plan_training(Checkpoint.open(path), Recipe(**{key: kind[key] for key in names & kind.keys()}))
    return {"recipe": recipe, "planned": plan.total, "measured": measured(path, recipe)}


def planned(name: str) -> list[list[str]]:
    """The plans for a large model, of which only the shapes are made: GB by length."""
    hidden, feed_forward, layers, heads, key_heads, vocabulary = LARGE[name]
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Checkpoint.of(name, Path(), config, {}).build()  # lazy: no weight is made
    header = {key: TensorInfo("F16", value.shape) for key, value in tree_flatten(model.parameters())}
    checkpoint = Checkpoint.of(name, Path(), config, {"model.safetensors": header})
    kinds = [{"fine_tune_type": "lora", "q_bits": 4}, {"fine_tune_type": "lora"}, {}]
    return [
        [
            name,
            f"{length:,}",
            *(f"{plan_training(checkpoint, Recipe(length, **kind)).total / 1e9:.1f}" for kind in kinds),
        ]
        for length in (4096, 8192, 16384, 32768)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A checkpoint's folder, instead of the random models.")
    arguments = parser.parse_args()
    large = [row for name in LARGE for row in planned(name)]
    print(markdown(("model", "tokens", "4 bits, GB", "LoRA on float16, GB", "all weights, GB"), large))
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is not None:
            models = {arguments.model.name: (None, arguments.model)}
        else:
            models = {name: (name, make(Path(folder) / str(i), *MODELS[name])) for i, name in enumerate(MODELS)}
        for title, (name, path) in models.items():
            for recipe in runs(name, slow=Checkpoint.open(path).dimensions.item_size < 4):
                row = compare(path, recipe)
                ratios.append(row["planned"] / row["measured"])
                said = " ".join(f"{key}={value}" for key, value in recipe.items() if key != "steps")
                sizes = (f"{row[key] / 1e6:,.1f}" for key in ("planned", "measured"))
                rows.append((title, said, *sizes, f"{ratios[-1]:.2f}"))
    print(markdown(("model", "recipe", "planned, MB", "measured, MB", "planned / measured"), rows))
    figures = {"runs": len(rows), "least": round(min(ratios), 3), "largest": round(max(ratios), 3)}
    print(json.dumps({"mlx": mx.__version__, "device": str(mx.default_device())} | figures))


if __name__ == "__main__":
    exit_with(main)
