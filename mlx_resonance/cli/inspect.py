"""`mlx-resonance inspect`: the rotary embedding of a checkpoint, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Argument, Option

from .options import Json, path
from .output import print_json, stderr, stdout

if TYPE_CHECKING:
    from ..inspection import Inspection


def command(
    model: Annotated[str, Argument(metavar="MODEL", help="Folder or Hugging Face hub id.")],
    train_length: Annotated[int | None, Option(min=1, max=2**24, help="Default: the context before scaling.")] = None,
    test_length: Annotated[int | None, Option(min=1, max=2**24, help="Default: the checkpoint's context.")] = None,
    plot: Annotated[Path | None, Option(**path, metavar="FILE.png", help="Draw wavelengths and feature gap.")] = None,
    json: Json = False,
) -> None:
    """Show a checkpoint's wavelengths and feature gap."""
    from ..checkpoint import Checkpoint
    from ..inspection import inspect_rope

    # For a model on the hub, only config.json is downloaded.
    inspection = inspect_rope(Checkpoint.open(model, weights=False).rope, train_length, test_length)
    if plot is not None:
        from ..plots import plot_inspection

        plot_inspection(inspection, plot)
        stderr.print(f"wrote {plot}")
    if json:
        print_json(inspection.to_dict())
    else:
        print_schedule(inspection)


def print_schedule(inspection: Inspection) -> None:
    """The wavelength table, one row per feature pair."""
    rope, in_use = inspection.rope, inspection.in_use
    critical = in_use.critical_pairs(inspection.train_length)
    stdout.print(
        f"{rope.rope_type}: base {rope.base:g}, {rope.dims} dims, factor {rope.parameters.get('factor', 1):g}, "
        f"attention scale {in_use.attention_scale:.4f}",
        soft_wrap=True,
    )
    stdout.print(
        f"{critical} of {rope.dims // 2} pairs turn fully within {inspection.train_length} tokens; "
        f"feature gap up to {inspection.test_length} tokens",
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
            "yes" if in_use.wavelengths[pair] <= inspection.train_length else "no",
            f"{inspection.gap[pair]:.4f}",
        )
    stdout.print(table)
    if not rope.is_resonant:
        stdout.print("The model uses the unrounded wavelengths; convert rounds them.")
