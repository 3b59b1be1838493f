"""`mlx-resonance inspect`: the rotary embedding of a checkpoint, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Argument, Option

from .options import Json, path
from .options import model as model_parser
from .output import check_outputs, draw, print_json, stdout

if TYPE_CHECKING:
    from ..inspection import Inspection


def command(
    model: Annotated[str, Argument(**model_parser, help="Folder or Hugging Face hub id.")],
    train_length: Annotated[
        int | None, Option(min=1, max=2**24, help="Default: on record, or the context before scaling.")
    ] = None,
    test_length: Annotated[int | None, Option(min=1, max=2**24, help="Default: the checkpoint's context.")] = None,
    plot: Annotated[Path | None, Option(**path, metavar="FILE.png", help="Draw wavelengths and feature gap.")] = None,
    json: Json = False,
) -> None:
    """Show a checkpoint's wavelengths and feature gap."""
    from ..checkpoint import Checkpoint
    from ..inspection import inspect_rope, training_of

    check_outputs(plot=plot)
    # For a model on the hub, only config.json and the record of its training are downloaded.
    checkpoint = Checkpoint.open(model, weights=False)
    training = training_of(checkpoint.folder, checkpoint.rope)
    inspection = inspect_rope(checkpoint.rope, train_length, test_length, training)
    if plot is not None:
        from ..plots import plot_inspection

        draw(plot_inspection, inspection, path=plot)
    if json:
        print_json(inspection.to_dict())
    else:
        print_schedule(inspection)


def print_schedule(inspection: Inspection) -> None:
    """The wavelength table, one row per feature pair."""
    rope, in_use = inspection.rope, inspection.in_use
    critical, gap = in_use.wavelengths <= inspection.train_length, inspection.gap
    stdout.print(
        f"{rope.rope_type}: base {rope.base:g}, {rope.dims} dims, factor {rope.parameters.get('factor', 1):g}, "
        f"attention scale {in_use.attention_scale:.4f}",
        soft_wrap=True,
    )
    pairs, length = rope.dims // 2, inspection.train_length
    stdout.print(
        f"{critical.sum()} of {pairs} pairs are pre-critical: they turn fully within {length} tokens", soft_wrap=True
    )
    stdout.print(f"trained angles: {inspection.training}", soft_wrap=True)
    stdout.print(
        f"feature gap to them up to {inspection.test_length} tokens: "
        f"{gap[critical].sum():.2f} summed over the pre-critical pairs, {gap[~critical].sum():.2f} over the others",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("pair", "wavelength", "rounded", "shift", "pre-critical", "feature gap"):
        table.add_column(name, justify="right")
    shifts = inspection.unrounded.angle_shift()
    rounded = inspection.unrounded.resonate().wavelengths
    for pair, wavelength in enumerate(inspection.unrounded.wavelengths):
        table.add_row(
            str(pair),
            f"{wavelength:,.3f}",
            f"{rounded[pair]:,.0f}",
            f"{100 * shifts[pair]:.3f} %",
            "yes" if critical[pair] else "no",
            f"{gap[pair]:.4f}",
        )
    stdout.print(table)
    if not rope.is_resonant:
        stdout.print("The model uses the unrounded wavelengths; convert rounds them.")
