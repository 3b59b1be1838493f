"""The checkpoints that `extension.py` extends: the package's, and models that it trains from scratch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlx_resonance import Checkpoint
from mlx_resonance.convert import convert
from mlx_resonance.storage import atomic_folder
from mlx_resonance.tokenizer import copy_tokenizer
from mlx_resonance.training import train

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from random_llama import TINY
from stdlib_llama import CONFIG, muon_and_adam, passkey_row, read, source_files

SMOLLM2 = Path("build") / "smollm2"
CONTEXT = 256  # that mini is trained with
MINI = CONFIG | {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "dtype": "float32", "torch_dtype": "float32",
}  # fmt: skip


TEXT_ROWS, KEY_ROWS, STEPS = 6, 4, 1000  # rows of text and of passkeys in a step


def key_row(tokenizer, seed: list[int]) -> list[int]:
    """A passkey prompt with its answer, of a length up to the context, the rest end tokens."""
    rng = np.random.default_rng(seed)
    length, depth, key = int(rng.integers(140, CONTEXT + 1)), int(rng.integers(0, 101)), int(rng.integers(1, 50001))
    prompt, answer = passkey_row(tokenizer, length, depth, key)
    row = prompt + answer + [CONFIG["eos_token_id"]] * (CONTEXT + 1)
    return row[: CONTEXT + 1]


def train_rows(model: nn.Module, seed: int, checkpoint: Path) -> None:
    """Train on rows of text and of passkeys."""
    tokenizer = Checkpoint.open(TINY).tokenizer
    parts = [[*tokenizer.encode(read(path)), CONFIG["eos_token_id"]] for path in source_files()[0]]
    stream = np.concatenate([np.array(part, np.int32) for part in parts])

    def batch(step: int) -> tuple[mx.array]:
        starts = np.random.default_rng((seed, step)).integers(0, len(stream) - CONTEXT - 1, size=TEXT_ROWS)
        tokens = [stream[i : i + CONTEXT + 1] for i in starts]
        tokens += [np.array(key_row(tokenizer, [seed, step, i, 1])) for i in range(KEY_ROWS)]
        return (mx.array(np.stack(tokens).astype(np.int32)),)

    def loss(model: nn.Module, rows: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).mean()

    def on_step(step: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"{checkpoint.stem} step {step}/{STEPS} loss {loss:.3f}", file=sys.stderr, flush=True)

    optimizer = muon_and_adam(STEPS)
    train(model, optimizer, loss, batch, STEPS, seed=seed, checkpoint=checkpoint, on_step=on_step)


def train_mini(rope: str, seed: int, folder: Path) -> None:
    """Train a model from scratch, and write a checkpoint."""
    config = MINI | {"rope_scaling": None if rope == "default" else {"rope_type": rope}}
    mx.random.seed(seed)
    model = Checkpoint.of("mini", folder, config, {}).build()
    train_rows(model, seed, folder.with_suffix(".safetensors"))
    write_checkpoint(model, config, TINY, folder)


def write_checkpoint(model: nn.Module, config: dict, source: Path, folder: Path) -> None:
    """A folder with the model's weights and the tokenizer of another, written atomically."""
    weights = dict(tree_flatten(model.parameters()))
    with atomic_folder(folder) as partial:
        copy_tokenizer(source, partial)
        mx.save_safetensors(str(partial / "model.safetensors"), weights, {"format": "mlx"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def base_folder(name: str, base: str, seed: int, work: Path) -> Path:
    """The checkpoint to extend, made if missing; in float32, the fast type on a CPU."""
    folder = work / (f"base-{base}-{seed}" if name == "mini" else name)
    if folder.exists():
        return folder
    if name == "mini":
        train_mini(base, seed, folder)
    else:
        convert(SMOLLM2 if name == "smollm2" else TINY, folder, resonance=False, dtype="float32")
    return folder
