"""`mlx-resonance convert`: a Hugging Face checkpoint to an MLX folder."""

from __future__ import annotations

import math
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from ..sizes import format_size
from .errors import fail
from .options import Json, MlxPath, Original, ScaledBy, file, model, size
from .output import bytes_bar, print_json, stderr

if TYPE_CHECKING:
    from ..convert import Conversion

SRC: dict[str, Any] = model | {"metavar": "SRC"}


def command(
    src: Annotated[str, Argument(**SRC, help="Folder, .gguf file or Hugging Face hub id.")],
    mlx_path: MlxPath,
    rope: Annotated[Literal["linear", "ntk", "dynamic", "yarn"] | None, Option(help="New scaling.")] = None,
    factor: ScaledBy = None,
    original_max_position_embeddings: Original = None,
    resonance: Annotated[bool, Option(help="Round wavelengths to whole tokens.")] = True,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, Option(help="Default: as in the source; of GGUF, float16.")
    ] = None,
    quantize: Annotated[bool, Option("-q", "--quantize", help="Quantize the weights.")] = False,
    q_bits: Annotated[int | None, Option(min=2, max=8, help="Bits per weight: 2, 3, 4, 5, 6 or 8. Affine: 4.")] = None,
    q_group_size: Annotated[int | None, Option(min=32, max=128, help="Weights per scale. Affine: 64.")] = None,
    q_mode: Annotated[Literal["affine", "mxfp4", "nvfp4", "mxfp8"], Option(help="Quantized format.")] = "affine",
    quant_predicate: Annotated[
        Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"] | None, Option(help="Recipe of mixed bits.")
    ] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the hub.")] = None,
    file: Annotated[str | None, Option(metavar="NAME", help="GGUF file of SRC, where it has several.")] = None,
    max_shard_size: Annotated[int, Option(**size, help="Largest weight file.")] = "5GB",  # type: ignore[assignment]
    portable: Annotated[bool, Option("--portable", help="For stock transformers and mlx-lm: as longrope.")] = False,
    verify: Annotated[bool, Option("--verify", help="Read the result again and compare with the source.")] = False,
    quant_report: Annotated[
        Path | None, Option(**file, metavar="TEXT", help="File to compare the quantized model with the source on.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be written; write nothing.")] = False,
    consume_source: Annotated[
        bool, Option("--consume-source", help="Keep one weight file of a hub model on disk at a time.")
    ] = False,
    tokenizer: Annotated[bool, Option(help="Refuse a source that has no tokenizer.")] = True,
    allow_nan: Annotated[bool, Option("--allow-nan", help="Convert tensors that are all NaN.")] = False,
    restart: Annotated[bool, Option("--restart", help="Delete what an unfinished run has left.")] = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint to MLX with Resonance RoPE."""
    arguments = {name: value for name, value in locals().items() if name != "json"}  # named as in Python

    from ..convert import VerificationError, convert

    try:
        with bytes_bar() as bar:
            task = bar.add_task("converting", total=None)

            def progress(part: int, total: int) -> None:
                if part < bar.tasks[task].completed:  # the weights are written, and now read again
                    bar.update(task, description="verifying")
                bar.update(task, completed=part, total=total)

            done = convert(**arguments, progress=progress)
    except VerificationError as error:
        fail(f"{error}: --restart converts again", 1)
    (report_plan if dry_run else report)(done)
    if json:
        settings = {"mlx_path": str(done.path), "rope": done.rope.to_hf("4"), "context": done.rope.context_length}
        costs = {key: getattr(done, key) for key in ("weights", "files", "memory", "disk", "download")}
        results = {key: getattr(done, key) for key in ("left_out", "quantization_error", "quant_report", "checks")}
        print_json(settings | {"largest_shift": done.largest_shift} | costs | results)


def summary(done: Conversion) -> str:
    """The result in a line."""
    files = "1 file" if done.files == 1 else f"{done.files} files"
    context = f"{done.rope.context_length:,} tokens of context" if done.rope.context_length else "context unknown"
    return f"{done.path}: {done.rope.rope_type}, {context}, {format_size(done.weights)} in {files}"


def report_plan(done: Conversion) -> None:
    """Print the files that would be written, and what that takes."""
    stderr.print("would write " + summary(done), soft_wrap=True)
    for name, written in done.sizes.items():
        stderr.print(f"  {name}  {format_size(written)}")
    free = shutil.disk_usage(next(parent for parent in done.path.absolute().parents if parent.exists())).free
    needed = done.disk + done.download
    download = f" ({format_size(done.download)} for downloads)" if done.download else ""
    stderr.print(
        f"takes about {format_size(done.memory)} of memory and {format_size(needed)} of disk{download}; "
        f"{format_size(free)} are free" + (": too little" if free < needed else ""),
        soft_wrap=True,
    )
    if done.left_out:
        stderr.print(describe_left_out(done.left_out), soft_wrap=True)


def report(done: Conversion) -> None:
    """Print what was made, and what rounding and quantization change."""
    lines = [summary(done)]
    if done.left_out:
        lines.append(describe_left_out(done.left_out))
    if done.largest_shift > 0:
        lines.append(
            f"note: rounding moved the wavelengths by up to {100 * done.largest_shift:.1f} %. In one model of 135 M "
            "parameters that was trained without it, that changed the perplexity of 512 to 4096 tokens by less than "
            "0.1 % (--no-resonance keeps the angles)"
        )
    errors = {name: math.inf if error is None else error for name, error in done.quantization_error.items()}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        lines.append(
            f"quantization error, as a part of a tensor's values: median {statistics.median(errors.values()):.1%}, "
            f"largest {errors[worst]:.1%} in {worst}; all are in conversion.json"
        )
    if done.quant_report is not None:
        lines.append(describe_quant_report(done.quant_report))
    if done.checks is not None:
        lines.append(describe_checks(done.checks))
    for line in lines:
        stderr.print(line, soft_wrap=True)


def describe_left_out(found: dict[str, str]) -> str:
    """Which tensors of the source were left out, and why, in a line: of several with one reason the first."""
    parts = []
    for reason in dict.fromkeys(found.values()):
        first, *others = [name for name in found if found[name] == reason]
        parts.append(f"{first}{f' and {len(others)} more' if others else ''} ({reason})")
    return "left out of the source: " + ", ".join(parts)


def describe_quant_report(found: dict[str, Any]) -> str:
    """The perplexities and the divergence, in a line."""
    perplexity, divergence = found["perplexity"], found["kl_divergence"]
    return (
        f"quantized: perplexity {perplexity['source']:.4g} -> {perplexity['quantized']:.4g} over {found['tokens']} "
        f"tokens, KL divergence {divergence['mean']:.3g} nats (largest {divergence['largest']:.3g}), "
        f"same likeliest token at {found['same_top_token']:.1%}"
    )


def describe_checks(found: dict[str, Any]) -> str:
    """What a successful verification found, in a line."""
    parts = [f"{found['files']} files as recorded", f"{found['tensors']} tensors"]
    if found["source"] is None:
        parts.append("not compared with the source (--source)")
    else:
        errors = [math.inf if error is None else error for error in found["errors"].values()]
        off = f", {len(errors)} within rounding (up to {max(errors):.2%})" if errors else ""
        parts.append(f"{found['exact']} equal to the source{off}")
        made = Counter(fate.split(":")[0].split(" into ")[0] for fate in found["source_tensors"].values())
        parts.append("of the source " + ", ".join(f"{count} {fate}" for fate, count in made.items()))
    parts.append(f"{found['nan']} NaN, {found['inf']} infinite")
    logits = found["logits"]
    if isinstance(logits, str):
        parts.append(f"logits not compared: {logits}")
    else:
        parts.append(f"logits of transformers within {logits['error']:.1e} ({logits['layers']} layers)")
    return "verified: " + "; ".join(parts)
