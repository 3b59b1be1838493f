"""`mlx-resonance finetune`: teach a checkpoint a longer context."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from ..sizes import format_size
from .options import LARGEST, Dtype, Force, Json, Memory, MlxPath, Model, Original, ScaledBy, path
from .output import count_bar, print_json, stderr

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..finetuning.recipes import Recipe

BATCHES = 2**16  # largest number of sequences at once, of batches in a step


def command(
    model: Model,
    data: Annotated[
        Path,
        Option(**path, metavar="DIR|FILE", help="Folder with train.jsonl or *.txt; or one file."),
    ],
    mlx_path: MlxPath,
    preset: Annotated[
        Literal["paper-7b", "paper-13b", "paper-4k"] | None, Option(help="The paper's settings, which others override.")
    ] = None,
    rope: Annotated[
        str | None, Option(help="Rope type, such as resonance_yarn. Default: the preset's, or the checkpoint's.")
    ] = None,
    factor: ScaledBy = None,
    original_max_position_embeddings: Original = None,
    length: Annotated[
        int | None,
        Option(min=2, max=LARGEST, help="Tokens of a sequence. Default: the context, with skips that before scaling."),
    ] = None,
    steps: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Updates of the weights. Default: the preset's, or 400.")
    ] = None,
    warmup: Annotated[
        int | None, Option(min=0, max=LARGEST, help="Steps in which the learning rate rises. Default: 1 in 20.")
    ] = None,
    learning_rate: Annotated[
        float | None, Option(min=0, max=1, help="Peak learning rate; it falls to 0. Default: 2e-5.")
    ] = None,
    weight_decay: Annotated[float | None, Option(min=0, max=1, help="AdamW's weight decay. Default: 0.")] = None,
    batch_size: Annotated[int | None, Option(min=1, max=BATCHES, help="Sequences at once. Default: 1.")] = None,
    accumulate: Annotated[
        int | None, Option(min=1, max=BATCHES, help="Batches whose gradients make a step. Default: 8.")
    ] = None,
    fine_tune_type: Annotated[
        Literal["full", "lora"] | None,
        Option(help="Train all weights, in float32, or LoRA. Default: full; lora where the weights are quantized."),
    ] = None,
    q_bits: Annotated[
        int | None, Option(min=2, max=8, help="Quantize the weights to train LoRA on (QLoRA): 2, 3, 4, 5, 6 or 8 bits.")
    ] = None,
    q_group_size: Annotated[
        int | None, Option(min=32, max=128, help="Weights per scale: 32, 64 or 128. Default: 64.")
    ] = None,
    q_mode: Annotated[
        Literal["affine", "mxfp4", "nvfp4", "mxfp8"] | None, Option(help="Quantized format. Default: affine.")
    ] = None,
    lora_rank: Annotated[int | None, Option(min=1, max=BATCHES, help="LoRA's rank. Default: 8.")] = None,
    lora_scale: Annotated[float | None, Option(min=0, max=10_000, help="LoRA's scale. Default: 20.")] = None,
    num_layers: Annotated[
        int | None, Option(min=1, max=LARGEST, help="Train only the last N layers. Default: all.")
    ] = None,
    grad_checkpoint: Annotated[
        bool | None,
        Option(
            "--grad-checkpoint/--no-grad-checkpoint",
            help="Activation checkpointing: less memory, more time. Default: on.",
        ),
    ] = None,
    skip_positions: Annotated[
        bool | None,
        Option("--skip-positions", help="Short sequences at positions drawn from the whole context (PoSE)."),
    ] = None,
    mask_prompt: Annotated[
        bool | None,
        Option("--mask-prompt/--no-mask-prompt", help="Of chats, train on the answers or on all. Default: answers."),
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, max=LARGEST, help="Seed of the order, the skips and LoRA's start. Default: 0.")
    ] = None,
    dtype: Dtype = None,
    checkpoint_every: Annotated[
        int, Option(min=1, max=LARGEST, help="Steps between two states that a run can resume from.")
    ] = 25,
    memory: Memory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a checkpoint on long texts.

    A killed run resumes when the command is repeated.
    """
    arguments = {name: value for name, value in locals().items() if name != "json"}  # named as in Python

    from ..finetuning import finetune

    with count_bar() as bar:
        done = finetune(**arguments, on_step=Report(bar))
    held_out = f", held out {done['valid_loss']:.3f}" if "valid_loss" in done else ""
    text = f"{mlx_path}: loss {done['losses'][0]:.3f} -> {done['losses'][-1]:.3f}{held_out}"
    stderr.print(f"{text}; peak memory {format_size(done['peak_memory'])}", soft_wrap=True)
    if json:
        print_json({"mlx_path": str(mlx_path)} | done)


class Report:
    """The progress of each step: in the bar on a terminal, elsewhere on a line of its own."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.row = bar, bar.add_task("compiling", total=None)
        self.first, self.last = 0, time.perf_counter()
        self.start = self.last

    def __call__(self, recipe: Recipe, step: int, loss: float, rate: float) -> None:
        """What `finetuning.finetune` calls."""
        import mlx.core as mx

        now = time.perf_counter()
        if not self.first:  # a resumed run begins later; loading and compiling do not count for the time left
            self.first, self.start = step, now
        speed = recipe.length * recipe.batch_size * recipe.accumulate / (now - self.last)
        self.last = now
        left = (recipe.steps - step) * (now - self.start) / max(step - self.first, 1)
        text = f"loss {loss:.3f}, rate {rate:.1e}, {speed:,.0f} tokens/s, {format_size(mx.get_peak_memory())}"
        self.bar.update(self.row, completed=step, total=recipe.steps, description=text)
        if not stderr.is_terminal:
            stderr.print(f"step {step} of {recipe.steps}: {text}, {left:.0f} s left", soft_wrap=True)
