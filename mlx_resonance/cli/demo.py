"""`mlx-resonance demo`: a number hidden in a text past the context, asked for with and without Resonance-YaRN."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Option

from ..errors import UsageError
from ..sizes import format_size
from ..storage import check_output_folder
from .options import Json, file, integers, model, path
from .output import count_bar, print_json, stdout
from .prompts import read_text

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..demo import Task

ROWS = 8  # of the schedule
AROUND = 48  # characters of the text that are shown before and after the number


def command(
    source: Annotated[
        str | None, Option("--model", "-m", **model, help="Default: the tiny checkpoint of the package.")
    ] = None,
    text: Annotated[
        Path | None, Option("--file", "-f", **file, metavar="TEXT", help="What hides the number. Default: sentences.")
    ] = None,
    lengths: Annotated[Any, Option(**integers(64, 2**24), help="Tokens. Default: 4 and 8 times the context.")] = None,
    factor: Annotated[float, Option(min=1, max=2**31, help="Factor by which the context grows.")] = 8,
    mlx_path: Annotated[
        Path | None, Option(**path, metavar="OUT", help="Folder of the result, which stays. Default: MODEL-8x.")
    ] = None,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="Of the number, and of the sentences.")] = 1,
    json: Json = False,
) -> None:
    """Hide a number in a text past the context; ask for it with and without Resonance-YaRN."""
    from ..checkpoint import Checkpoint

    if mlx_path is not None:
        check_output_folder(mlx_path, "mlx_path")
    hidden_in = None if text is None else read_text(text)
    with ExitStack() as stack:
        if json:
            stack.enter_context(redirect_stdout(sys.stderr))
        own = files("mlx_resonance") / "assets" / "stdlib-llama"
        opened = Checkpoint.open(source or stack.enter_context(as_file(own)))
        result = _demo(opened, hidden_in, lengths, factor, mlx_path, seed)
    if json:
        print_json(result)


def _demo(
    source: Checkpoint, text: str | None, lengths: list[int] | None, factor: float, mlx_path: Path | None, seed: int
) -> dict[str, Any]:
    """The steps; returns their figures."""
    import mlx.core as mx

    from ..demo import answers, converted, hide, ropes

    start, name = time.perf_counter(), source.folder.name
    trained = source.rope.own_context
    if trained is None:
        raise UsageError(f"{name} does not say how many tokens it was trained on", option="model")
    lengths = sorted(lengths or [4 * trained, 8 * trained])
    tasks = [hide(source, length, text, seed) for length in lengths]
    settings = ropes(source.rope, factor, max(lengths))
    # 16-bit matrix products are slow on a CPU.
    dtype = "float32" if mx.default_device() == mx.cpu else None
    target = converted(source, mlx_path or Path(f"{name}-{factor:g}x"), factor, dtype)

    stdout.print(
        f"{name} was trained on {trained:,} tokens. It reads {lengths[0]:,}, with a number near the beginning:\n"
    )
    stdout.print(_excerpt(source, tasks[0]), style="dim", soft_wrap=True)
    with count_bar() as bar:
        row = bar.add_task("prompt tokens", total=len(settings) * sum(len(task.prompt) for task in tasks))
        found = list(answers(target.load(), target, settings, tasks, lambda count: bar.advance(row, count)))
    stdout.print()
    stdout.print(_answers(found, lengths, trained))
    stdout.print(
        f"\n{_verdict(found)}\n\nNothing was trained: {target.folder} has the same weights, "
        f"{format_size(sum(path.stat().st_size for path in target.folder.glob('*.safetensors')))}, "
        "and these wavelengths, in tokens:\n",
    )
    stdout.print(_schedule(target))
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
    stdout.print(f"\n{seconds:.1f} s, peak memory {format_size(peak)}. To try next:\n")
    for line in _next(target.folder):
        stdout.print(f"  {line}", style="bold", soft_wrap=True)
    return {"mlx_path": str(target.folder), "seed": seed, "seconds": round(seconds, 2), "answers": found}


def _excerpt(checkpoint: Checkpoint, task: Task) -> str:
    """What surrounds the number, and the question."""
    from ..evaluation.passkey import QUESTION

    text = checkpoint.tokenizer.decode(task.prompt)
    at = text.index(str(task.key))
    statement = text[:at].rindex("\n")
    after = text.index("\n", at)
    # The number is between two tokens, not words: whole words only.
    before = " ".join(text[:statement][-AROUND:].split()[1:-1])
    behind = " ".join(text[after:][:AROUND].split()[1:-1])
    lines = (f"… {before} …", text[statement:after].strip(), f"… {behind} …", QUESTION)
    return "\n".join(f"  {line}" for line in lines)


def _answers(found: Sequence[dict[str, Any]], lengths: Sequence[int], trained: int) -> Table:
    """The answers, by rope settings and length."""
    table = Table(box=None, padding=(0, 3, 0, 0), title_justify="left", pad_edge=False)
    table.add_column("")
    for length in lengths:
        table.add_column(f"{length:,} tokens ({length / trained:g} ×)")
    for name in dict.fromkeys(answer["angles"] for answer in found):
        own = [answer for answer in found if answer["angles"] == name]
        table.add_row(name, *map(_cell, own))
    return table


def _verdict(found: Sequence[dict[str, Any]]) -> str:
    """What the answers show."""
    stretched = [answer["found"] for answer in found if "YaRN" in answer["angles"]]
    if all(stretched):
        return "YaRN makes the longer context work, rounded to whole tokens or not; either way its angles are exact."
    return f"With YaRN the model finds {sum(stretched)} of {len(stretched)}; its angles are exact, rounded or not."


def _cell(answer: dict[str, Any]) -> Text:
    """The beginning of an answer, and whether it is right."""
    text = " ".join(answer["text"].split())[:24]
    return Text(f"✓ {text}", style="green") if answer["found"] else Text(f"✗ {text}", style="red")


def _schedule(checkpoint: Checkpoint) -> Table:
    """Some of the wavelengths, before and after."""
    from ..inspection import inspect_rope, training_of

    training = training_of(checkpoint.folder, checkpoint.rope)
    trained, inspection = training.frequencies.wavelengths, inspect_rope(checkpoint.rope, training=training)
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for name in ("pair", "trained", "YaRN", "rounded"):
        table.add_column(name, justify="right")
    for pair in range(0, len(trained), -(-len(trained) // ROWS)):
        stretched, rounded = inspection.unrounded.wavelengths[pair], inspection.in_use.wavelengths[pair]
        table.add_row(str(pair), f"{trained[pair]:,.2f}", f"{stretched:,.2f}", f"{rounded:,.0f}")
    return table


def _next(folder: Path) -> list[str]:
    """Commands to type."""
    # By the path that was typed, unless the shell finds it by its name.
    on_path, called = shutil.which("mlx-resonance"), Path(sys.argv[0])
    by_name = called.name != "mlx-resonance" or (on_path is not None and Path(on_path).resolve() == called.resolve())
    command, target = "mlx-resonance" if by_name else shlex.quote(str(called)), shlex.quote(str(folder))
    return [
        f"{command} generate --model {target} --prompt 'import os' --max-tokens 100",
        f"{command} inspect {target} --plot wavelengths.png",
        f"{command} plan --model {target}",
    ]
