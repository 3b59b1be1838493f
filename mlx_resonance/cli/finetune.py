"""`mlx-resonance finetune`: a checkpoint learns a longer context."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from .options import Dtype, Force, Json, Memory, MlxPath, Model, Original, ScaledBy, memory_bytes
from .output import count_bar, print_json, stderr

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..finetuning.recipes import Recipe


def command(
    model: Model,
    data: Annotated[Path, Option(metavar="DIR|FILE", help="Folder with train.jsonl or *.txt; or a .jsonl or text.")],
    mlx_path: MlxPath,
    preset: Annotated[str | None, Option(help="The paper's: paper-7b, paper-13b or paper-4k.")] = None,
    rope: Annotated[
        str | None, Option(help="Rope type, such as resonance_yarn. Default: the preset's, or the checkpoint's.")
    ] = None,
    factor: ScaledBy = None,
    original_max_position_embeddings: Original = None,
    length: Annotated[int | None, Option(help="Tokens of a sequence. Default: the context.")] = None,
    steps: Annotated[int | None, Option(help="Updates of the weights. Default: 400.")] = None,
    warmup: Annotated[int | None, Option(help="Steps in which the learning rate rises. Default: 1 in 20.")] = None,
    learning_rate: Annotated[float | None, Option(help="The highest; it falls to 0. Default: 2e-5.")] = None,
    weight_decay: Annotated[float | None, Option(help="Of AdamW. Default: 0.")] = None,
    batch_size: Annotated[int | None, Option(help="Sequences at once. Default: 1.")] = None,
    accumulate: Annotated[int | None, Option(help="Batches whose gradients are a step's. Default: 8.")] = None,
    fine_tune_type: Annotated[str | None, Option(help="full (in float32) or lora. Default: full.")] = None,
    lora_rank: Annotated[int | None, Option(help="Default: 8.")] = None,
    lora_scale: Annotated[float | None, Option(help="Default: 20.")] = None,
    num_layers: Annotated[int | None, Option(help="Train the last N layers only. Default: all.")] = None,
    grad_checkpoint: Annotated[
        bool, Option("--grad-checkpoint", help="Less memory, more time: compute activations again.")
    ] = False,
    seed: Annotated[int | None, Option(help="Of the order of the texts. Default: 0.")] = None,
    dtype: Dtype = None,
    checkpoint_every: Annotated[int, Option(help="Steps between two states to go on from.")] = 25,
    memory: Memory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a checkpoint on long texts.

    A run that was stopped goes on.
    """
    from ..finetuning import finetune

    size = memory_bytes(memory)
    with count_bar() as bar:
        done = finetune(
            model,
            data,
            mlx_path,
            preset=preset,
            rope=rope,
            factor=factor,
            original_max_position_embeddings=original_max_position_embeddings,
            dtype=dtype,
            checkpoint_every=checkpoint_every,
            memory=size,
            force=force,
            on_step=Report(bar),
            length=length,
            steps=steps,
            warmup=warmup,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            accumulate=accumulate,
            fine_tune_type=fine_tune_type,
            lora_rank=lora_rank,
            lora_scale=lora_scale,
            num_layers=num_layers,
            grad_checkpoint=grad_checkpoint or None,
            seed=seed,
        )
    held_out = f", held out {done['valid_loss']:.3f}" if "valid_loss" in done else ""
    text = f"{mlx_path}: loss {done['losses'][0]:.3f} -> {done['losses'][-1]:.3f}{held_out}"
    stderr.print(f"{text}; peak memory {done['peak_memory'] / 1e6:,.0f} MB", soft_wrap=True)
    if json:
        print_json({"mlx_path": str(mlx_path)} | done)


class Report:
    """A line for every step: on a terminal in the bar, else one after the other."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.row = bar, bar.add_task("compiling", total=None)
        self.first, self.last = 0, time.perf_counter()
        self.start = self.last

    def __call__(self, recipe: Recipe, step: int, loss: float, rate: float) -> None:
        """What `finetuning.finetune` calls."""
        import mlx.core as mx

        now = time.perf_counter()
        if not self.first:  # a run that goes on begins later; loading and compiling do not count for the time left
            self.first, self.start = step, now
        speed = recipe.length * recipe.batch_size * recipe.accumulate / (now - self.last)
        self.last = now
        left = (recipe.steps - step) * (now - self.start) / max(step - self.first, 1)
        text = f"loss {loss:.3f}, rate {rate:.1e}, {speed:,.0f} tokens/s, {mx.get_peak_memory() / 1e9:.2f} GB"
        self.bar.update(self.row, completed=step, total=recipe.steps, description=text)
        if not stderr.is_terminal:
            stderr.print(f"step {step} of {recipe.steps}: {text}, {left:.0f} s left", soft_wrap=True)
