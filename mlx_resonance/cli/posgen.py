"""`mlx-resonance posgen`: data, training, evaluation, sweep and report of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from .options import Json
from .output import count_bar, print_json, stderr, stdout

if TYPE_CHECKING:
    from ..posgen.settings import Settings
    from ..posgen.tasks import Task

app = typer.Typer(help="PosGen: train on short sequences, test on long ones.", no_args_is_help=True)

Subtask = Annotated[str, Option(help="recursive, cot or semi-recursive.")]
Arithmetic = Annotated[str, Option(help="mod_addition, pow_sin or pow_sin_2pi.")]
Modulus = Annotated[int, Option(help="Number of digits.")]
Near = Annotated[int, Option(help="Tokens just before the next that it depends on.")]
Far = Annotated[int, Option(help="Tokens further back that it depends on.")]
Preset = Annotated[str, Option(help="laptop, paper, official, or smoke (seconds, for tests).")]
Split = Annotated[str | None, Option(help="official or disjoint. Default: the preset's.")]
TrainScaled = Annotated[
    bool | None, Option("--train-scaled/--no-train-scaled", help="Scale while training, too. Default: the preset's.")
]
Epochs = Annotated[int | None, Option(help="Passes over the training rows. Default: the preset's.")]


@app.command()
def data(
    subtask: Subtask,
    output: Annotated[Path, Option(metavar="FILE.npy", help="The int32 table, one sequence per row.")],
    arithmetic: Arithmetic = "mod_addition", modulus: Modulus = 17, near: Near = 3, far: Far = 1,
    rows: Annotated[int, Option(help="Number of sequences.")] = 12000,
    length: Annotated[int, Option(help="Tokens of a sequence.")] = 512,
    split: Annotated[str, Option(help="official: as the paper's code; disjoint: random seeds.")] = "official",
    json: Json = False,
) -> None:  # fmt: skip
    """Write a table of sequences."""
    import numpy as np

    from ..files import user_path
    from ..posgen.data import make_table
    from ..whole import whole_file

    output = user_path(output)
    if output.is_dir():
        raise ValueError(f"[posgen] {output} is a folder")
    if not output.parent.is_dir():
        raise ValueError(f"[posgen] {output}: there is no folder {output.parent}")
    if output.suffix != ".npy":
        raise ValueError(f"[posgen] {output}: the suffix must be .npy")
    table = make_table(_task(subtask, arithmetic, modulus, near, far), split, rows, length)
    with whole_file(output) as partial:
        np.save(partial, table)
    if json:
        print_json({"output": str(output), "split": split, "rows": rows, "length": length})
    else:
        stdout.print(f"wrote {output}: {rows} rows of {length} tokens, {split} split")


@app.command()
def train(
    subtask: Subtask,
    encoding: Annotated[str, Option(help="rope, linear, ntk or yarn, or resonance_ before one of them.")],
    preset: Preset = "laptop",
    seed: Annotated[int, Option(help="Of weights, order of rows and dropout.")] = 42,
    output: Annotated[Path | None, Option(metavar="DIR", help="Default: posgen-SUBTASK-ENCODING-PRESET-SEED.")] = None,
    arithmetic: Arithmetic = "mod_addition", modulus: Modulus = 17, near: Near = 3, far: Far = 1,
    split: Split = None, train_scaled: TrainScaled = None, epochs: Epochs = None, json: Json = False,
) -> None:  # fmt: skip
    """Train one model and test it; a run that was stopped goes on."""
    from ..posgen.runs import train_into

    settings = _settings(preset, split, train_scaled, epochs)
    task = _task(subtask, arithmetic, modulus, near, far)
    folder = output or Path(f"posgen-{task.subtask}-{encoding}-{preset}-{seed}")
    with count_bar() as bar:
        result = train_into(folder, preset, settings, task, encoding, seed, _progress(bar, encoding, settings))
    if json:
        print_json(result | {"split": settings.split, "output": str(folder)})
    else:
        _print_result(result, settings)
        stdout.print(f"wrote {folder}")


@app.command("eval")
def evaluate(
    model: Annotated[Path, Argument(metavar="DIR", help="What `posgen train` wrote.")],
    encoding: Annotated[str | None, Option(help="Another one than the weights were chosen for.")] = None,
    length: Annotated[int | None, Option(help="Digits of a test row; scaling goes with it.")] = None,
    json: Json = False,
) -> None:
    """Test a trained model at another length, with another encoding."""
    from ..posgen.runs import evaluate_from
    from ..posgen.settings import settings_from

    result = evaluate_from(model, encoding, length)
    settings = settings_from(result["settings"])
    if json:
        print_json(result | {"split": settings.split})
    else:
        _print_result(result, settings)


@app.command()
def sweep(
    preset: Preset = "laptop",
    seeds: Annotated[int, Option(help="How many: the paper's five first.")] = 5,
    output: Annotated[
        Path | None,
        Option(metavar="FILE.jsonl", help="Default: posgen-PRESET.jsonl, or posgen-PRESET-train-scaled.jsonl."),
    ] = None,
    subtask: Annotated[list[str] | None, Option(help="Only this one; may be repeated.")] = None,
    encoding: Annotated[list[str] | None, Option(help="Only this one; may be repeated.")] = None,
    together: Annotated[
        int | None, Option(help="Seeds trained side by side. Default: 1 on a CPU, all on a GPU.")
    ] = None,
    arithmetic: Arithmetic = "mod_addition", modulus: Modulus = 17, near: Near = 3, far: Far = 1,
    split: Split = None, train_scaled: TrainScaled = None, epochs: Epochs = None, json: Json = False,
) -> None:  # fmt: skip
    """Train and test what the results file does not have yet."""
    from ..posgen.report import summarize
    from ..posgen.settings import ENCODINGS, sweep_seeds
    from ..posgen.sweep import run_sweep
    from ..posgen.tasks import SUBTASKS

    settings = _settings(preset, split, train_scaled, epochs)
    subtasks = [name.replace("_", "-") for name in subtask or SUBTASKS]
    task = _task(subtasks[0], arithmetic, modulus, near, far)
    output = output or Path(f"posgen-{preset}{'-train-scaled' if train_scaled else ''}.jsonl")
    with count_bar() as bar:

        def on_run(run: Any, number: int, count: int) -> Callable[..., None]:
            seeds = ", ".join(map(str, run.seeds))
            text = f"{number} of {count}: {run.task.subtask}, {', '.join(run.encodings)}, seed {seeds}"
            stderr.print(text, soft_wrap=True)
            return _progress(bar, run.encodings[-1], settings)

        lines = run_sweep(
            output, preset, settings, task, subtasks=subtasks, encodings=encoding or ENCODINGS,
            seeds=sweep_seeds(seeds), together=together, on_run=on_run,
        )  # fmt: skip
    if json:
        print_json({"output": str(output), "split": settings.split, "results": len(lines), **summarize(lines)})
    else:
        split = f"{settings.split} split"
        text = f"{output} has {len(lines)} results, {split}; `mlx-resonance posgen report {output}` shows them"
        stdout.print(text, soft_wrap=True)


@app.command()
def report(
    results: Annotated[Path, Argument(metavar="FILE.jsonl", help="What `posgen sweep` wrote.")],
    plot: Annotated[Path | None, Option(metavar="FILE.png", help="Draw accuracy over the position.")] = None,
    json: Json = False,
) -> None:
    """Show a sweep's table beside the paper's."""
    from ..files import user_path
    from ..posgen.report import accuracy_curves, summarize
    from ..posgen.sweep import read_results

    header, lines = read_results(user_path(results))
    if not lines:
        raise ValueError(f"[posgen] {results} has no results yet")
    summary = summarize(lines)
    if plot is not None:
        from ..plots import plot_posgen

        seed_length = header["task"]["near"] + header["task"]["far"]
        plot_posgen(accuracy_curves(lines), seed_length, header["settings"]["train_length"], user_path(plot))
        stderr.print(f"wrote {plot}")
    if json:
        common = {name: header[name] for name in ("preset", "task", "settings")}
        print_json(common | {"split": header["settings"]["split"]} | summary)
    else:
        _print_report(header, summary)


def _task(subtask: str, arithmetic: str, modulus: int, near: int, far: int) -> Task:
    from ..posgen.tasks import Task

    return Task(subtask.replace("_", "-"), arithmetic, modulus, near, far)


def _settings(preset: str, split: str | None, train_scaled: bool | None, epochs: int | None) -> Settings:
    from dataclasses import replace

    from ..posgen.settings import PRESETS

    if preset not in PRESETS:
        raise ValueError(f"[posgen] preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    changes: dict[str, Any] = {"split": split, "train_scaled": train_scaled, "epochs": epochs}
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


def _progress(bar: Any, encoding: str, settings: Settings) -> Callable[[int, float, float, float], None]:
    for task_id in bar.task_ids:
        bar.remove_task(task_id)
    row = bar.add_task("compiling", total=settings.steps)

    def show(step: int, loss: float, inside: float, outside: float) -> None:
        text = f"loss {loss:.3f}"
        if inside == inside:
            text += f", {encoding}: in {100 * inside:.1f} %, out {100 * outside:.1f} %"
        bar.update(row, completed=step, description=text)

    return show


def _print_result(result: dict[str, Any], settings: Settings) -> None:
    from ..posgen.report import PAPER

    inside, outside = f"up to {settings.train_length}", f"{settings.train_length + 1} to {settings.test_length}"
    table = Table("accuracy, %", inside, outside, box=None, pad_edge=False)
    table.add_row("teacher-forced", *(f"{100 * result[name]:.2f}" for name in ("id", "ood")))
    table.add_row("written from the seed", *(f"{100 * result[name]:.2f}" for name in ("generated_id", "generated_ood")))
    table.add_row(f"written from {settings.train_length} tokens on", "", f"{100 * result['continued_ood']:.2f}")
    stdout.print(
        f"{result['subtask']}, {result['encoding']}, seed {result['seed']}, {settings.split} split, "
        f"weights of step {result['step']} of {settings.steps}",
        soft_wrap=True,
    )
    stdout.print(table)
    paper = PAPER[result["subtask"]].get(result["encoding"])
    if paper is not None:
        text = f"The paper has {paper} past the training length (teacher-forced, 5 seeds, a larger model)."
        stdout.print(text, soft_wrap=True)


def _print_report(header: dict[str, Any], summary: dict[str, Any]) -> None:
    task, settings = header["task"], header["settings"]
    scaled = "scaled while training, too" if settings["train_scaled"] else "trained unscaled"
    rule = f"modulus {task['modulus']}, near {task['near']}, far {task['far']}"
    stdout.print(f"{header['preset']}: {task['arithmetic']}, {rule}, {settings['split']} split")
    stdout.print(f"{settings['train_length']} digits to train on, {settings['test_length']} to test on; {scaled}")
    stdout.print("Accuracy in %, mean over seeds. in, out: teacher-forced up to and past the")
    stdout.print("training length; written, continued: past it in free text from the seed, from it.")
    for subtask, encodings in summary["table"].items():
        counts = sorted({row["seeds"] for row in encodings.values()})
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{subtask}, {'-'.join(map(str, counts))} seeds", min_width=22, no_wrap=True)
        for name in ("in", "out", "std", "variance", "paper", "written", "continued"):
            table.add_column(name, justify="right", no_wrap=True)
        for encoding, row in encodings.items():
            names = ("id", "ood", "ood_std", "ood_variance", "paper", "generated_ood", "continued_ood")
            table.add_row(encoding, *("" if row[name] is None else f"{row[name]:.2f}" for name in names))
        stdout.print(table)
    if not any(summary["pairs"].values()):
        return
    stdout.print("What resonance adds out of distribution; 95 % interval: paired bootstrap, seeds.")
    pairs = Table(box=None, pad_edge=False)
    pairs.add_column("", min_width=22)
    for name in ("encoding", "seeds", "difference", "interval"):
        pairs.add_column(name, justify="left" if name == "encoding" else "right", no_wrap=True)
    for subtask, found in summary["pairs"].items():
        for base, row in found.items():
            interval = "" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
            pairs.add_row(subtask, base, str(row["seeds"]), f"{row['difference']:+.2f}", interval)
    stdout.print(pairs)
