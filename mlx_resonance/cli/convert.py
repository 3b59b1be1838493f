"""`mlx-resonance convert`: a Hugging Face checkpoint to an MLX folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .output import bytes_bar, print_json, stderr

if TYPE_CHECKING:
    from ..convert import Conversion


def command(
    src: Annotated[str, Argument(metavar="SRC", help="Folder or Hugging Face hub id.")],
    mlx_path: Annotated[Path, Option("--mlx-path", help="Folder to write; must not exist.")],
    rope: Annotated[str | None, Option(help="New scaling: linear, ntk, dynamic or yarn.")] = None,
    factor: Annotated[float | None, Option(help="How many times the context grows.")] = None,
    original_max_position_embeddings: Annotated[
        int | None, Option(help="Tokens of context before scaling. Default: as in the source.")
    ] = None,
    resonance: Annotated[bool, Option(help="Round wavelengths to whole tokens.")] = True,
    dtype: Annotated[str | None, Option(help="float32, float16 or bfloat16. Default: as in the source.")] = None,
    quantize: Annotated[bool, Option("-q", "--quantize", help="Quantize the weights.")] = False,
    q_bits: Annotated[int | None, Option(help="Bits per weight.")] = None,
    q_group_size: Annotated[int | None, Option(help="Weights per scale.")] = None,
    q_mode: Annotated[str, Option(help="affine, mxfp4, nvfp4 or mxfp8.")] = "affine",
    quant_predicate: Annotated[str | None, Option(help="Mixed recipe, such as mixed_4_6.")] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the hub.")] = None,
    max_shard_size: Annotated[str, Option(help="Largest weight file.")] = "5GB",
    portable: Annotated[bool, Option("--portable", help="For stock transformers and mlx-lm: as longrope.")] = False,
    restart: Annotated[bool, Option("--restart", help="Drop what an unfinished run has left.")] = False,
    json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a checkpoint to MLX with Resonance RoPE."""
    from ..convert import convert

    if not src.strip() or not str(mlx_path).strip():
        raise typer.BadParameter("SRC and --mlx-path must not be empty")
    with bytes_bar() as bar:
        task = bar.add_task("converting", total=None)
        done = convert(
            src,
            mlx_path,
            progress=lambda part, total: bar.update(task, completed=part, total=total),
            portable=portable,
            restart=restart,
            rope=rope,
            factor=factor,
            original_max_position_embeddings=original_max_position_embeddings,
            resonance=resonance,
            dtype=dtype,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            q_mode=q_mode,
            quant_predicate=quant_predicate,
            revision=revision,
            max_shard_size=max_shard_size,
        )
    report(done)
    if json:
        settings = {"mlx_path": str(done.path), "rope": done.rope.to_hf("4"), "context": done.rope.context_length}
        print_json(settings | {"largest_shift": done.largest_shift, "weights": done.weights, "files": done.files})


def report(done: Conversion) -> None:
    """Say what was made, and what rounding does to a checkpoint that was trained without it."""
    files = "1 file" if done.files == 1 else f"{done.files} files"
    context = f"{done.rope.context_length} tokens of context" if done.rope.context_length else "context unknown"
    size = f"{done.weights / 1e6:.1f} MB in {files}"
    stderr.print(f"{done.path}: {done.rope.rope_type}, {context}, {size}", soft_wrap=True)
    if done.largest_shift > 0:
        stderr.print(
            f"note: rounding moved the wavelengths by up to {100 * done.largest_shift:.1f} %; a checkpoint that was "
            "trained without resonance loses a little until it is fine-tuned (--no-resonance keeps its angles)",
            soft_wrap=True,
        )
