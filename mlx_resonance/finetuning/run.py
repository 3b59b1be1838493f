"""finetune(): a checkpoint, text and a recipe to a checkpoint of longer context; a killed run goes on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..checks import check_config, unite
from ..files import TOKENIZER_PATTERNS, WEIGHTS, read_config, read_header, resolve, user_path, weight_files
from ..generation.prompt_cache import model_digest
from ..loading import for_models, load_model, load_tokenizer
from ..records import append_records, open_records, read_records
from ..rope_config import RopeConfig
from ..training import train, warmup_linear
from ..whole import check_new, in_the_way, whole_folder
from .chunks import computed_again, next_token_loss
from .data import Batches, data_files, packed
from .memory import guard
from .recipes import Recipe, choose
from .result import write_result

KIND, RECORD = "finetune", "finetune.jsonl"  # settings, then a line for each step
CHECKPOINT, RESULT = "checkpoint.safetensors", "result"
DTYPES = ("float32", "float16", "bfloat16")
HELD_OUT = 32  # most sequences that the loss of valid.jsonl is of

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
    """Train a checkpoint on long sequences. The result appears whole or not at all.

    The work is done in `mlx_path`.partial; the same call goes on with what a killed run has left there, and ends
    bit-identical to an uninterrupted one on a CPU.

    Args:
        model: a folder, or the id of a model on the hub. A quantized one is for `lora`; its result is not quantized.
        data: what `data.data_files` takes.
        mlx_path: the folder to write, a checkpoint; it must not exist. LoRA's changes are fused into its weights, and
            lie beside them in `adapters`, as mlx-lm has them.
        preset, rope, factor, original_max_position_embeddings, changes: as in `recipes.choose`.
        dtype: float32, float16 or bfloat16 of the result; None for the source's.
        checkpoint_every: steps between two states to go on from.
        memory: bytes there are; None for what the device says.
        force: go on though it does not fit into memory.
        on_step: called after every step with the recipe, the steps done, the step's loss and learning rate.

    Returns:
        `settings` of the run, its `losses`, the `valid_loss` where there is a valid.jsonl, and the `peak_memory`.

    Raises:
        FileNotFoundError: no such model or data.
        FileExistsError: `mlx_path` exists, another run is at it, or `mlx_path`.partial is none of ours.
        ValueError: an argument or a file is wrong, it does not fit into memory, or an earlier run had other settings.
        FloatingPointError: the loss is no longer a number.
        OSError: the disk is full; the same call goes on.
    """
    target = user_path(mlx_path)
    check_new(KIND, target)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"[finetune] dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if checkpoint_every < 1:
        raise ValueError(f"[finetune] checkpoint_every must be at least 1, got {checkpoint_every}")
    folder = resolve(model, None, [*TOKENIZER_PATTERNS, WEIGHTS])
    before = RopeConfig.from_hf(read_config(folder))
    after, recipe = choose(before, preset, rope, factor, original_max_position_embeddings, **changes)
    _check_model(folder, after, recipe)
    if not force:
        guard(folder, recipe, memory)
    train_files, valid_files = data_files(data)
    tokenizer = load_tokenizer(folder, read_config(folder))
    sequences = packed(train_files, tokenizer, recipe.length, recipe.seed)
    held_out = packed(valid_files, tokenizer, recipe.length, recipe.seed)[:HELD_OUT] if valid_files else None
    settings = {
        "model": str(model),
        "digest": model_digest(folder, after, None),
        "rope": after.to_hf("4"),
        "recipe": asdict(recipe),
        "dtype": dtype,
        "sequences": len(sequences),
        "data_digest": hashlib.sha256(sequences.tobytes()).hexdigest()[:16],
    }
    with _workspace(target, settings) as partial:
        trained, config = load_model(folder, lazy=True, rope=after)
        dtype = dtype or str(trained.model.norm.weight.dtype).removeprefix("mlx.core.")
        prepare(trained, recipe)
        with computed_again(trained, recipe.grad_checkpoint):
            _train(trained, recipe, sequences, partial, checkpoint_every, on_step)
            held = {} if held_out is None else {"valid_loss": _mean_loss(trained, held_out, recipe.batch_size)}
        found = {"settings": settings, "losses": _losses(partial), **held, "peak_memory": mx.get_peak_memory()}
        write_result(
            partial / RESULT, trained, config, folder, partial / RECORD, recipe=recipe, dtype=dtype, name=str(model)
        )
    return found


def _check_model(folder: Path, rope: RopeConfig, recipe: Recipe) -> None:
    """Refuse a checkpoint that cannot be trained so. Raises ValueError."""
    tensors = unite({file.name: read_header(file) for file in weight_files(folder)})
    config = check_config(for_models(read_config(folder), rope)[0], tensors)
    if config.get("quantization") and not recipe.lora:
        raise ValueError(
            "[finetune] the weights are quantized, which cannot be trained: give --fine-tune-type lora, or the original"
        )
    if (recipe.num_layers or 0) > config["num_hidden_layers"]:
        raise ValueError(
            f"[finetune] num_layers must be at most the model's {config['num_hidden_layers']}, got {recipe.num_layers}"
        )


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Make trainable what the recipe trains, in float32.

    What is not trained keeps its type, unless that is float16, in which gradients vanish: then all is in float32.
    """
    if not recipe.lora or model.model.norm.weight.dtype == mx.float16:
        model.set_dtype(mx.float32)
    model.freeze()
    if recipe.lora:
        mx.random.seed(recipe.seed)
        linear_to_lora_layers(model, recipe.num_layers or len(model.layers), recipe.lora_parameters)
    elif recipe.num_layers is None:
        model.unfreeze()
    else:
        for layer in model.layers[-recipe.num_layers :]:
            layer.unfreeze()


@contextlib.contextmanager
def _workspace(target: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """OUT.partial with the run's record; at the end its `result` becomes OUT by one rename, and the rest goes."""
    with whole_folder(KIND, target, RESULT) as partial:
        if any(partial.iterdir()) and not (partial / RECORD).is_file():
            raise in_the_way(KIND, partial)
        try:
            open_records(partial / RECORD, KIND, settings)
        except ValueError as error:
            raise ValueError(str(error).replace("--output", "--mlx-path")) from None
        yield partial


def _train(
    model: nn.Module,
    recipe: Recipe,
    sequences: np.ndarray,
    partial: Path,
    checkpoint_every: int,
    on_step: OnStep | None,
) -> None:
    """All steps that the folder's checkpoint does not have yet; each is a line of the record."""
    optimizer = optim.AdamW(
        warmup_linear(recipe.learning_rate, recipe.steps, recipe.rise),
        betas=[recipe.beta_1, recipe.beta_2],
        weight_decay=recipe.weight_decay,
        bias_correction=True,
    )

    def note(step: int, loss: float) -> None:
        rate = float(np.array(optimizer.learning_rate))
        append_records(partial / RECORD, [{"step": step, "loss": loss, "learning_rate": rate}])
        if on_step is not None:
            on_step(recipe, step, loss, rate)

    train(
        model,
        optimizer,
        next_token_loss,
        Batches(sequences, recipe.batch_size * recipe.accumulate, recipe.seed),
        recipe.steps,
        seed=recipe.seed,
        checkpoint=partial / CHECKPOINT,
        checkpoint_every=checkpoint_every,
        max_grad_norm=None,  # as the authors of YaRN and of Resonance RoPE
        on_step=note,
        accumulate=recipe.accumulate,
    )


def _losses(partial: Path) -> list[float]:
    """Of each step; of one that was done again after a kill, the last."""
    return list({line["step"]: line["loss"] for line in read_records(partial / RECORD, KIND)[1]}.values())


def _mean_loss(model: nn.Module, sequences: np.ndarray, batch_size: int) -> float:
    """Of every next token of sequences that were held out, in nats."""
    total = 0.0
    for i in range(0, len(sequences), batch_size):
        rows = sequences[i : i + batch_size]
        total += float(np.array(next_token_loss(model, mx.array(rows)))) * len(rows)
    return total / len(sequences)
