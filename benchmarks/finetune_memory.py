"""The memory plan of fine-tuning against the measured peak: random LLaMAs of several shapes, or a checkpoint (--model).

Prints a table and, as its last line, one JSON object. On a CPU it takes some minutes.
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
from mlx_resonance.finetuning import Recipe, finetune
from mlx_resonance.finetuning.memory import plan_training

import mlx.core as mx
from random_llama import make
from rich.console import Console
from rich.table import Table

# hidden, feed-forward, layers, heads, key heads, vocabulary, type
MODELS = {
    "15 MB": (256, 576, 5, 4, 2, 2048, mx.float32),
    "50 MB, wide": (512, 1536, 4, 8, 8, 4096, mx.float32),
    "43 MB, large vocabulary": (256, 704, 3, 4, 4, 32_000, mx.float32),
    "44 MB, deep": (192, 512, 24, 3, 3, 2048, mx.float32),
    "8 MB, float16": (256, 576, 5, 4, 2, 2048, mx.float16),
    "8 MB, bfloat16": (256, 576, 5, 4, 2, 2048, mx.bfloat16),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A checkpoint's folder, instead of the random models.")
    parser.add_argument("--rows", type=Path, help="JSON lines to write every row to.")
    arguments = parser.parse_args()
    table = Table("model", "recipe", "planned, MB", "measured, MB", "planned / measured")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is not None:
            models = {arguments.model.name: (None, arguments.model, Checkpoint.open(arguments.model))}
        else:
            made = {name: make(Path(folder) / str(i), *shape) for i, (name, shape) in enumerate(MODELS.items())}
            models = {name: (name, path, Checkpoint.open(path)) for name, path in made.items()}
        for title, (name, path, checkpoint) in models.items():
            for recipe in runs(name, slow=checkpoint.dimensions.item_size < 4):
                row = {"model": title} | compare(path, recipe)
                rows.append(row)
                said = " ".join(f"{key}={value}" for key, value in recipe.items() if key not in ("steps", "accumulate"))
                said += " accumulate=2" if recipe["accumulate"] > 1 else ""
                megabytes = (f"{row[key] / 1e6:.1f}" for key in ("planned", "measured"))
                table.add_row(title, said, *megabytes, f"{row['planned'] / row['measured']:.2f}")
                if arguments.rows is not None:
                    with arguments.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    Console(width=140).print(table)
    ratios = [row["planned"] / row["measured"] for row in rows]
    figures = {"runs": len(rows), "least": round(min(ratios), 3), "largest": round(max(ratios), 3)}
    print(json.dumps({"mlx": mx.__version__, "device": str(mx.default_device())} | figures))


if __name__ == "__main__":
    main()
