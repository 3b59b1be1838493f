"""`mlx-resonance eval passkey`: can a model say a number that is hidden in filler?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Option

from .output import count_bar, print_json, stderr, stdout


def command(
    model: Annotated[str, Option(help="Folder or Hugging Face hub id.")],
    lengths: Annotated[str, Option(help="Tokens of prompt and answer, with commas.")],
    output: Annotated[Path, Option(metavar="FILE.jsonl", help="One line per trial; what is there is not tried again.")],
    depths: Annotated[str, Option(help="Where the key is, in % of the filler, with commas.")] = "0,25,50,75,100",
    repetitions: Annotated[int, Option(help="Keys tried at each length and depth.")] = 5,
    seed: Annotated[int, Option(help="Of the keys.")] = 0,
    factor: Annotated[float | None, Option(help="Stretch the context to so many times the trained one.")] = None,
    kv_bits: Annotated[int | None, Option(help="Keep keys and values in 4 or 8 bits.")] = None,
    memory: Annotated[str | None, Option(help="What there is, such as 16GB. Default: what the device says.")] = None,
    force: Annotated[bool, Option("--force", help="Go on though it does not fit into memory.")] = False,
    plot: Annotated[Path | None, Option(metavar="FILE.png", help="Draw the grid.")] = None,
    json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hide a number in filler and ask for it.

    At every length and depth of a grid.
    """
    from ..config import RopeConfig
    from ..evaluation.passkey import ANSWER_TOKENS, Grid, accuracy, run_passkey
    from ..files import TOKENIZER_PATTERNS, WEIGHTS, parse_size, read_config, resolve, user_path
    from ..generation import check_context
    from ..generation.memory import guard
    from ..generation.prompt_cache import model_digest
    from ..loading import load
    from ..scaling import rescale

    grid = Grid(_numbers("--lengths", lengths), _numbers("--depths", depths), repetitions, seed)
    if plot is not None:
        from ..plots import image_path, plot_passkey

        image_path(plot)  # refused now, not after hours
    folder = resolve(model, None, [*TOKENIZER_PATTERNS, WEIGHTS])
    rope = RopeConfig.from_hf(read_config(folder))
    rope = rope if factor is None else rescale(rope, factor)
    longest = max(grid.lengths)
    check_context(rope, longest - ANSWER_TOKENS, ANSWER_TOKENS)
    if not force:
        guard(folder, longest, kv_bits=kv_bits, memory=None if memory is None else parse_size(memory, "--memory"))
    loaded, tokenizer = load(folder, factor=factor)
    # The digest covers the weights; the rest is for who reads the file.
    header = {"model": model, "rope": rope.to_hf(), "kv_bits": kv_bits, "digest": model_digest(folder, rope, kv_bits)}
    with count_bar() as bar:
        task = bar.add_task("passkey", total=None)
        trials = run_passkey(
            loaded, tokenizer, grid, user_path(output), header, kv_bits=kv_bits,
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


def _numbers(flag: str, text: str) -> list[int]:
    """Different whole numbers with commas between them."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(
            f"[passkey] {flag} must be whole numbers with commas, such as 1024,2048, got {text!r}"
        ) from None
