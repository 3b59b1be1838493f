"""finetune(): a checkpoint, texts and a recipe become a checkpoint of longer context; a killed run resumes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..checkpoint import Checkpoint
from ..errors import check_option
from ..files import user_path
from ..rope import expect
from ..run_log import RunLog
from ..storage import atomic_folder, check_new_folder, in_the_way
from ..training import train, warmup_linear
from ..wired import wired
from .base import check_trainable, is_quantized, prepare
from .chunks import activation_checkpointing, next_token_loss
from .data import Batches, Dated, data_files, packed, token_ids, token_weights
from .memory import require_training_memory
from .recipes import Recipe, choose
from .result import check_range, write_result

KIND, RECORD = "finetune", "finetune.jsonl"  # of the run log: a line for each step
CHECKPOINT, RESULT = "checkpoint.safetensors", "result"
DTYPES = ("float32", "float16", "bfloat16")
HELD_OUT = 32  # maximum number of sequences that the loss of valid.jsonl is measured on

OnStep = Callable[[Recipe, int, float, float], None]


def finetune(
    model: str | Path,
    data: str | Path,
    mlx_path: str | Path,
    *,
    preset: str | None = None,
    rope: str | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    dtype: str | None = None,
    checkpoint_every: int = 25,
    memory: int | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train a checkpoint on long sequences. The result is written atomically.

    The work is done in `mlx_path`.partial; after a kill, the same call resumes from there, and ends bit-identical to an
    uninterrupted one on a CPU.

    Args:
        model: a folder, or the id of a model on the hub. A quantized one is for `lora`.
        data: as in `data.data_files`.
        mlx_path: the folder to write, a checkpoint; it must not exist. LoRA's changes are fused into the weights that
            they were trained on, dequantized where those are quantized; they are also in its `adapters`, in mlx-lm's
            format.
        preset, rope, factor, original_max_position_embeddings, changes: as in `recipes.choose`.
        dtype: float32, float16 or bfloat16 of the result; None for the source's.
        checkpoint_every: steps between two states to resume from.
        memory: memory budget in bytes; None for the device's limit.
        force: run although it does not fit into memory.
        on_step: called after every step with the recipe, the steps done, the step's loss and learning rate.

    Returns:
        `settings` of the run, its `losses`, the `valid_loss` where there is a valid.jsonl, and the `peak_memory`.

    Raises:
        MissingFileError: no such model or data.
        FileInTheWayError: `mlx_path` exists, another run writes it, or `mlx_path`.partial is not ours.
        UsageError: an argument or a file is wrong, it does not fit into memory, or an earlier run had other settings.
        FloatingPointError: the loss is not a number.
        OSError: the disk is full; the same call resumes.
    """
    target = user_path(mlx_path)
    check_new_folder(target)
    check_option("dtype", dtype is None or dtype in DTYPES, f"one of {', '.join(DTYPES)}", repr(dtype))
    check_option("checkpoint_every", checkpoint_every >= 1, "at least 1", checkpoint_every)
    source = Checkpoint.open(model)
    after, recipe = choose(
        source.rope, preset, rope, factor, original_max_position_embeddings, is_quantized(source), **changes
    )
    source = source.with_rope(after)
    check_trainable(source, recipe)
    if not force:
        require_training_memory(source, recipe, memory)
    train_files, valid_files = data_files(data)
    packing = source.tokenizer, recipe.length, recipe.seed, recipe.mask_prompt
    sequences = packed(train_files, *packing)
    held_out = packed(valid_files, *packing)[:HELD_OUT] if valid_files else None
    context = source.rope.context_length if recipe.skip_positions else None
    with atomic_folder(target, RESULT) as partial:
        dated = Dated(partial, source, [*train_files, *valid_files], packing[1:])
        sequences, held_out = dated.as_begun(sequences, held_out)
        settings = source.settings() | {
            "recipe": asdict(recipe),
            "dtype": dtype,
            "sequences": len(sequences),
            "data_digest": hashlib.sha256(sequences.tobytes()).hexdigest()[:16],
        }
        log = open_log(partial, settings, source.name)
        dated.keep(sequences, held_out)
        trained = source.load(lazy=True)
        dtype = dtype or str(trained.model.norm.weight.dtype).removeprefix("mlx.core.")
        check_range(source, dtype)
        prepare(trained, recipe)
        expect(trained, context or 0)  # angles that change with the length are those of the whole context
        with wired(model=trained), activation_checkpointing(trained, recipe.grad_checkpoint):
            _train(trained, recipe, sequences, log, checkpoint_every, on_step, context)
            held = {} if held_out is None else {"valid_loss": _mean_loss(trained, held_out, recipe.batch_size)}
        found = {
            "settings": {"model": source.name} | settings,
            "losses": [step["loss"] for step in log.records],
            **held,
            "peak_memory": mx.get_peak_memory(),
        }
        write_result(partial / RESULT, trained, source, log.path, recipe=recipe, dtype=dtype)
    return found


def open_log(folder: Path, settings: dict[str, Any], name: str) -> RunLog:
    """The run log of a folder that is empty or an earlier run's: settings, then loss and learning rate of each step."""
    if any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise in_the_way(folder)
    fields, about = {"loss": float, "learning_rate": float}, {"model": name}
    return RunLog(folder / RECORD, KIND, settings, about=about, key=("step",), fields=fields, option="mlx_path")


def _train(
    model: nn.Module, recipe: Recipe, sequences: np.ndarray, log: RunLog, checkpoint_every: int, on_step: OnStep | None,
    context: int | None = None,
) -> None:  # fmt: skip
    """All steps that the checkpoint beside the run log does not have yet; the log gets a line for each.

    `context`: what skipped positions cover; None for no skips.
    """
    optimizer = optim.AdamW(
        warmup_linear(recipe.learning_rate, recipe.steps, recipe.rise),
        betas=[recipe.beta_1, recipe.beta_2],
        weight_decay=recipe.weight_decay,
        bias_correction=True,
    )

    def note(step: int, loss: float) -> None:
        rate = float(np.array(optimizer.learning_rate))
        log.append({"step": step, "loss": loss, "learning_rate": rate})
        if on_step is not None:
            on_step(recipe, step, loss, rate)

    train(
        model,
        optimizer,
        next_token_loss,
        Batches(sequences, recipe.batch_size * recipe.accumulate, recipe.seed, context),
        recipe.steps,
        seed=recipe.seed,
        checkpoint=log.path.with_name(CHECKPOINT),
        checkpoint_every=checkpoint_every,
        max_grad_norm=None,  # as the authors of YaRN and of Resonance RoPE
        on_step=note,
        accumulate=recipe.accumulate,
        loss_scale=loss_scale(model, recipe),
    )


def loss_scale(model: nn.Module, recipe: Recipe) -> float:
    """A power of two, about the number of tokens: the mean over them makes gradients too small for float16."""
    if not recipe.lora or model.model.norm.weight.dtype != mx.float16:
        return 1.0
    return 2.0 ** int(math.log2(min(2**16, recipe.batch_size * recipe.length)))


def _mean_loss(model: nn.Module, sequences: np.ndarray, batch_size: int) -> float:
    """Of every next token of held-out sequences that the loss counts, at consecutive positions, in nats."""
    total, weights = 0.0, token_weights(sequences)
    for i in range(0, len(sequences), batch_size):
        rows = slice(i, i + batch_size)
        loss = next_token_loss(model, mx.array(token_ids(sequences[rows])), mx.array(weights[rows]))
        total += float(np.array(loss)) * len(weights[rows])
    return total / len(sequences)
