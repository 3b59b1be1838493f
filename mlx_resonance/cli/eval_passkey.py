"""`mlx-resonance eval passkey`: does a model find a number that is hidden in filler?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Option

from ..errors import check_option
from ..rope_types import LONGEST
from .options import Extend, Factor, Force, Json, KvBits, KvRotate, Memory, Model, integers, kv_format, path
from .output import check_outputs, count_bar, draw, print_json, stdout

MOST_TRIALS = 10**6


def command(
    model: Model,
    lengths: Annotated[Sequence[int], Option(**integers(1, LONGEST), help="Tokens of prompt and answer.")],
    output: Annotated[
        Path, Option(**path, metavar="FILE.jsonl", help="Run log of the trials, from which a killed run resumes.")
    ],
    depths: Annotated[Sequence[int], Option(**integers(0, 100), help="Where the key is, in % of the filler.")] = (
        0, 25, 50, 75, 100,
    ),
    repetitions: Annotated[int, Option(min=1, max=10_000, help="Keys at each length and depth.")] = 5,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="Seed of the keys.")] = 0,
    factor: Factor = None,
    extend: Extend = None,
    kv_bits: KvBits = None,
    kv_rotate: KvRotate = False,
    memory: Memory = None,
    force: Force = False,
    plot: Annotated[Path | None, Option(**path, metavar="FILE.png", help="Draw the grid.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Hide a number in filler and ask for it.

    At every length and depth of a grid.
    """
    from ..checkpoint import Checkpoint
    from ..evaluation.context import choose_context, describe
    from ..evaluation.passkey import PasskeyGrid, accuracy, run_passkey

    check_outputs(output, plot)
    most = MOST_TRIALS // (len(lengths) * len(depths))
    wanted = f"at most {most}, which are a million trials at all lengths and depths"
    check_option("repetitions", repetitions <= most, wanted, repetitions)
    grid = PasskeyGrid(lengths, depths, repetitions, seed)
    checkpoint = Checkpoint.open(model, factor=factor).extended(extend, max(lengths))
    kv_bits = kv_format(kv_bits, kv_rotate)
    context = choose_context(checkpoint, max(lengths), kv_bits=kv_bits, memory=memory, force=force)
    with count_bar() as bar:
        task = bar.add_task("passkey", total=None)
        trials = run_passkey(
            checkpoint, grid, output, kv_bits=kv_bits,
            on_trial=lambda done, total, trial: bar.update(
                task, completed=done, total=total, description=f"length {trial['length']}, depth {trial['depth']} %"
            ),
        )  # fmt: skip
    found = accuracy(grid, trials)
    if plot is not None:
        from ..plots import plot_passkey

        draw(plot_passkey, sorted(lengths), depths, found, path=plot)
    if json:
        cells = {"lengths": sorted(lengths), "depths": list(depths), "accuracy": found.tolist()}
        about = describe(checkpoint, kv_bits, context=context, truncation=None, chat_template=False)
        print_json({"output": str(output), "trials": len(trials), "found": float(found.mean()), **cells, **about})
        return
    table = Table(box=None, pad_edge=False)
    for name in ("depth", *map(str, sorted(lengths))):
        table.add_column(name, justify="right")
    for depth, row in zip(depths, found, strict=True):
        table.add_row(f"{depth} %", *(f"{100 * value:.0f} %" for value in row))
    stdout.print(table)
