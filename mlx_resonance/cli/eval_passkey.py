"""`mlx-resonance eval passkey`: can a model say a number that is hidden in filler?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Option

from .options import Factor, Force, Json, KvBits, Memory, Model, memory_bytes, whole_numbers
from .output import count_bar, print_json, stderr, stdout


def command(
    model: Model,
    lengths: Annotated[str, Option(help="Tokens of prompt and answer, with commas.")],
    output: Annotated[Path, Option(metavar="FILE.jsonl", help="One line per trial; what is there is not tried again.")],
    depths: Annotated[str, Option(help="Where the key is, in % of the filler, with commas.")] = "0,25,50,75,100",
    repetitions: Annotated[int, Option(help="Keys tried at each length and depth.")] = 5,
    seed: Annotated[int, Option(help="Of the keys.")] = 0,
    factor: Factor = None,
    kv_bits: KvBits = None,
    memory: Memory = None,
    force: Force = False,
    plot: Annotated[Path | None, Option(metavar="FILE.png", help="Draw the grid.")] = None,
    json: Json = False,
) -> None:
    """Hide a number in filler and ask for it.

    At every length and depth of a grid.
    """
    from ..evaluation.checkpoint import open_checkpoint
    from ..evaluation.passkey import KIND, Grid, accuracy, run_passkey
    from ..files import user_path

    grid = Grid(whole_numbers(KIND, "--lengths", lengths), whole_numbers(KIND, "--depths", depths), repetitions, seed)
    if plot is not None:
        from ..plots import image_path, plot_passkey

        image_path(plot)  # refused now, not after hours
    checkpoint = open_checkpoint(
        KIND, model, context=max(grid.lengths), factor=factor, kv_bits=kv_bits, memory=memory_bytes(memory), force=force
    )
    loaded, tokenizer = checkpoint.load(), checkpoint.tokenizer
    with count_bar() as bar:
        task = bar.add_task("passkey", total=None)
        trials = run_passkey(
            loaded, tokenizer, grid, user_path(output), checkpoint.header, kv_bits=kv_bits,
            on_trial=lambda done, total, trial: bar.update(
                task, completed=done, total=total, description=f"length {trial['length']}, depth {trial['depth']} %"
            ),
        )  # fmt: skip
    found = accuracy(grid, trials)
    if plot is not None:
        plot_passkey(sorted(grid.lengths), grid.depths, found, plot)
        stderr.print(f"wrote {plot}")
    if json:
        cells = {"lengths": sorted(grid.lengths), "depths": list(grid.depths), "accuracy": found.tolist()}
        print_json({"output": str(output), "trials": len(trials), "found": float(found.mean()), **cells})
        return
    table = Table(box=None, pad_edge=False)
    for name in ("depth", *map(str, sorted(grid.lengths))):
        table.add_column(name, justify="right")
    for depth, row in zip(grid.depths, found, strict=True):
        table.add_row(f"{depth} %", *(f"{100 * value:.0f} %" for value in row))
    stdout.print(table)
