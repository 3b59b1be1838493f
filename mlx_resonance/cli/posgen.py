"""`mlx-resonance posgen`: data, training, evaluation, sweep and report of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from typer import Argument, BadParameter, Option

from ..errors import MissingFileError, UsageError, check_option
from ..posgen.data import LARGEST, SPLITS, make_table
from ..posgen.report import BAR, WEIGHTS, below_bar, figure_of, paper_of, summarize
from ..posgen.settings import ENCODINGS, LONGEST, MOST_SEEDS, MOST_STEPS, PRESETS, Settings, settings_from, sweep_seeds
from ..posgen.tasks import ARITHMETICS, LARGEST_SUM, SUBTASKS, Task
from ..storage import atomic_file, check_output_folder
from .errors import Command
from .options import Json, completed_from, file, path
from .output import check_apart, check_outputs, count_bar, draw, print_json, stderr, stdout

app = typer.Typer(help="PosGen: train on short sequences, test on long ones.", no_args_is_help=True)


def _choice(names: Collection[str], metavar: str | None = None) -> dict[str, Any]:
    """For Typer: one of some names, with - or _ in them."""

    def parse(text: str) -> str:
        for name in names:
            if text.replace("-", "_") == name.replace("-", "_"):
                return name
        raise BadParameter(f"{text!r} is not one of {', '.join(names)}")

    return {"parser": parse, "autocompletion": completed_from(names), "metavar": metavar or "|".join(names)}


_encoding = _choice(ENCODINGS, "[resonance_]rope|linear|ntk|yarn")
Subtask = Annotated[str, Option(**_choice(SUBTASKS), help="Where the far tokens lie.")]
Arithmetic = Annotated[str, Option(**_choice(ARITHMETICS), help="Function of the sum of near and far tokens.")]
Modulus = Annotated[int, Option(min=2, max=LARGEST_SUM, help="Number of digits.")]
Near = Annotated[int, Option(min=1, max=LARGEST_SUM, help="Number of tokens just before the next one that decide it.")]
Far = Annotated[int, Option(min=0, max=LARGEST_SUM, help="Number of tokens further back that decide it.")]
Preset = Annotated[str, Option(**_choice(PRESETS), help="Model and training; smoke takes seconds, for tests.")]
Split = Annotated[str | None, Option(**_choice(SPLITS), help="Seeds of the rows. Default: the preset's.")]
TrainScaled = Annotated[
    bool | None, Option("--train-scaled/--no-train-scaled", help="Scale in training, too. Default: the preset's.")
]
Epochs = Annotated[
    int | None, Option(min=1, max=MOST_STEPS, help="Passes over the training rows. Default: the preset's.")
]
_ramp: dict[str, Any] = {"min": 2, "max": 2**31 - 1}
RAMP = "Tokens in which YaRN's ramp counts turns."


@app.command(cls=Command)
def data(
    subtask: Subtask,
    output: Annotated[Path, Option(**path, metavar="FILE.npy", help="The int32 table, one sequence per row.")],
    arithmetic: Arithmetic = "mod_addition", modulus: Modulus = 17, near: Near = 3, far: Far = 1,
    rows: Annotated[int, Option(min=1, max=LARGEST, help="Number of sequences.")] = 12000,
    length: Annotated[int, Option(min=1, max=LARGEST, help="Number of tokens in a sequence.")] = 512,
    split: Annotated[
        str, Option(**_choice(SPLITS), help="official: seeds as in the paper's code; disjoint: random ones.")
    ] = "official",
    json: Json = False,
) -> None:  # fmt: skip
    """Write a table of sequences."""
    check_outputs(output)
    if not output.parent.is_dir():
        raise MissingFileError(f"{output}: there is no folder {output.parent}", option="output")
    check_option("output", output.suffix == ".npy", "a name that ends in .npy", output)
    table = make_table(Task(subtask, arithmetic, modulus, near, far), split, rows, length)
    with atomic_file(output) as partial:
        try:
            np.save(partial, table)
        except OSError as error:  # NumPy says how many numbers were written, not where
            raise OSError(f"{output} cannot be written ({error.strerror or error})") from None
    if json:
        print_json({"output": str(output), "split": split, "rows": rows, "length": length})
    else:
        stdout.print(f"wrote {output}: {rows} rows of {length} tokens, {split} split")


@app.command(cls=Command)
def train(
    subtask: Subtask,
    encoding: Annotated[str, Option(**_encoding, help="Rotary encoding.")],
    preset: Preset = "laptop",
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="Seed of weights, order of rows and dropout.")] = 42,
    output: Annotated[
        Path | None, Option(**path, metavar="DIR", help="Folder. Default: posgen-SUBTASK-ENCODING-PRESET-SEED.")
    ] = None,
    arithmetic: Arithmetic = "mod_addition", modulus: Modulus = 17, near: Near = 3, far: Far = 1,
    split: Split = None, train_scaled: TrainScaled = None, epochs: Epochs = None,
    ramp: Annotated[int | None, Option(**_ramp, help=f"{RAMP} Default: the preset's first.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Train one model and test it, or resume a run that was stopped."""
    from ..posgen.runs import train_into

    settings = _settings(preset, split, train_scaled, epochs, [ramp] if ramp else [], [encoding])
    task = Task(subtask, arithmetic, modulus, near, far)
    folder = output or Path(f"posgen-{task.subtask}-{encoding}-{preset}-{seed}")
    check_output_folder(folder, "output")
    with count_bar() as bar:
        result = train_into(folder, preset, settings, task, encoding, seed, _progress(bar, encoding, settings))
    if json:
        print_json(result | {"split": settings.split, "output": str(folder)})
    else:
        _print_result(result, settings, task)
        stdout.print(f"wrote {folder}")


@app.command("eval", cls=Command)
def evaluate(
    model: Annotated[Path, Argument(**path, metavar="DIR", help="Folder that `posgen train` wrote.")],
    encoding: Annotated[
        str | None, Option(**_encoding, help="Another encoding than the weights were chosen for.")
    ] = None,
    length: Annotated[
        int | None, Option(min=1, max=LONGEST, help="Number of digits in a test row; the scaling follows it.")
    ] = None,
    ramp: Annotated[int | None, Option(**_ramp, help=f"{RAMP} Default: as trained.")] = None,
    json: Json = False,
) -> None:
    """Test a trained model at another length, with another encoding."""
    from ..posgen.runs import evaluate_from

    result = evaluate_from(model, encoding, length, ramp)
    settings = settings_from(result["settings"])
    if json:
        print_json(result | {"split": settings.split})
    else:
        _print_result(result, settings, Task(result["subtask"], **result["task"]))


@app.command(cls=Command)
def sweep(
    preset: Preset = "laptop",
    seeds: Annotated[int, Option(min=1, max=MOST_SEEDS, help="Number of seeds, the paper's five first.")] = 5,
    output: Annotated[
        Path | None,
        Option(**path, metavar="FILE.jsonl", help="Run log. Default: posgen-PRESET[-train-scaled].jsonl."),
    ] = None,
    subtask: Annotated[list[str] | None, Option(**_choice(SUBTASKS), help="Only this one; may be repeated.")] = None,
    encoding: Annotated[list[str] | None, Option(**_encoding, help="Only this one; may be repeated.")] = None,
    arithmetic: Arithmetic = "mod_addition", modulus: Modulus = 17, near: Near = 3, far: Far = 1,
    split: Split = None, train_scaled: TrainScaled = None, epochs: Epochs = None,
    ramp: Annotated[
        list[int] | None, Option(**_ramp, help=f"{RAMP} May be repeated. Default: the preset's.")
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Train and test what the run log does not have yet."""
    from ..posgen.sweep import header, run_sweep

    check_outputs(output)
    encodings = encoding or ENCODINGS
    settings = _settings(preset, split, train_scaled, epochs, ramp or [], encodings)
    subtasks = subtask or SUBTASKS
    task = Task(subtasks[0], arithmetic, modulus, near, far)
    output = output or Path(f"posgen-{preset}{'-train-scaled' if train_scaled else ''}.jsonl")
    with count_bar() as bar:

        def on_run(run: Any, number: int, count: int) -> Callable[..., None]:
            names = "; ".join(map(str, run.readings))
            stderr.print(f"{number} of {count}: {run.task.subtask}, {names}, seed {run.seed}", soft_wrap=True)
            return _progress(bar, str(run.readings[-1]), settings)

        lines = run_sweep(
            output, preset, settings, task, subtasks=subtasks, encodings=encodings,
            seeds=sweep_seeds(seeds), on_run=on_run,
        )  # fmt: skip
    if json:
        common = {"output": str(output), "split": settings.split, "results": len(lines)}
        print_json(common | summarize(header(preset, settings, task), lines))
    else:
        split = f"{settings.split} split"
        text = f"{output} has {len(lines)} results, {split}; `mlx-resonance posgen report {output}` shows them"
        stdout.print(text, soft_wrap=True)


@app.command(cls=Command)
def report(
    results: Annotated[Path, Argument(**file, metavar="FILE.jsonl", help="Run log that `posgen sweep` wrote.")],
    plot: Annotated[Path | None, Option(**path, metavar="FILE.png", help="Draw accuracy over the position.")] = None,
    weights: Annotated[str, Option(**_choice(WEIGHTS), help="Best on validation, or those of the last step.")] = "best",
    json: Json = False,
) -> None:
    """Show a sweep's table beside the paper's."""
    from ..posgen.sweep import read_results

    check_outputs(plot=plot)
    check_apart(results, plot)
    header, lines = read_results(results)
    if not lines:
        raise UsageError(f"{results} has no results yet", option="results")
    summary = summarize(header, lines, weights)
    if plot is not None:
        from ..plots import plot_posgen

        draw(plot_posgen, *figure_of(header, lines, weights), path=plot)
    if json:
        common = {name: header[name] for name in ("preset", "task", "settings")}
        print_json(common | {"split": header["settings"]["split"], "weights": weights} | summary)
    else:
        _print_report(header, summary, weights)


def _settings(
    preset: str, split: str | None, train_scaled: bool | None, epochs: int | None, ramps: Collection[int],
    encodings: Collection[str],
) -> Settings:  # fmt: skip
    given = ", ".join(map(str, ramps))
    check_option("ramp", not ramps or any(name.endswith("yarn") for name in encodings), "given for YaRN alone", given)
    changes: dict[str, Any] = {"split": split, "train_scaled": train_scaled, "epochs": epochs}
    changes["ramps"] = tuple(dict.fromkeys(ramps)) or None
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


def _print_result(result: dict[str, Any], settings: Settings, task: Task) -> None:
    inside, outside = f"up to {settings.train_length}", f"{settings.train_length + 1} to {settings.test_length}"
    table = Table("accuracy, %", inside, outside, box=None, pad_edge=False)
    table.add_row("teacher-forced", *(f"{100 * result[name]:.2f}" for name in ("id", "ood")))
    table.add_row("written from the seed", *(f"{100 * result[name]:.2f}" for name in ("generated_id", "generated_ood")))
    table.add_row(f"written from a prompt of {settings.train_length}", "", f"{100 * result['continued_ood']:.2f}")
    stdout.print(
        f"{result['subtask']}, {result['encoding']}, seed {result['seed']}, {settings.split} split, "
        f"weights of step {result['step']} of {settings.steps}",
        soft_wrap=True,
    )
    stdout.print(table)
    paper = paper_of(task, settings, result["encoding"])
    if paper is not None:
        text = f"The paper reports {paper} past the training length (teacher-forced, 5 seeds, a larger model)."
        stdout.print(text, soft_wrap=True)


def _print_report(header: dict[str, Any], summary: dict[str, Any], weights: str) -> None:
    task, settings = header["task"], header["settings"]
    scaled = "scaled in training, too" if settings["train_scaled"] else "trained unscaled"
    rule = f"modulus {task['modulus']}, near {task['near']}, far {task['far']}"
    stdout.print(f"{header['preset']}: {task['arithmetic']}, {rule}, {settings['split']} split, {weights} weights")
    stdout.print(f"{settings['train_length']} digits to train on, {settings['test_length']} to test on; {scaled}")
    stdout.print("Accuracy in %, mean over seeds, the true tokens given. learned: up to the")
    stdout.print(f"training length, read as trained, without the first prediction; *: below {BAR:g} in a")
    stdout.print("seed, or not known. in, out: up to and past that length, read with scaled")
    stdout.print("angles. near, far: where the last tokens tell the next one, and where the far")
    stdout.print("window has moved.")
    for subtask, readings in summary["table"].items():
        same = summary["same_seeds"][subtask]
        seeds = f"{next(iter(readings.values()))['seeds']} seeds" if same else "(number of seeds)"
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        table.add_column(f"{subtask},\n{seeds}", min_width=18, no_wrap=True)
        for column in ("first", "learned", "near\nin", "in", "out", "std", "near\nout", "far\nout", "paper"):
            table.add_column(column, justify="right", no_wrap=True)
        for reading, row in readings.items():
            names = ("first", "trained_id", "trained_near", "id", "ood", "ood_std", "near", "far", "paper")
            cells = ["" if row[name] is None else f"{row[name]:.1f}" for name in names]
            label = reading if same else f"{reading} ({row['seeds']})"
            table.add_row(label, cells[0], cells[1] + "*" * below_bar(row), *cells[2:])
        limits = summary["bounds"][subtask]
        for bound in ("chance", "ceiling"):
            near_and_far = (f"{limits[kind][bound]:.1f}" if kind in limits else "" for kind in ("near", "far"))
            table.add_row(bound, "", "", "", "", f"{limits['all'][bound]:.1f}", "", *near_and_far)
        stdout.print(table)
    if uneven := [subtask for subtask, same in summary["same_seeds"].items() if not same]:
        subtasks = ", ".join(uneven)
        stdout.print(f"{subtasks}: the rows are means over different seeds, not to be compared;", soft_wrap=True)
        stdout.print("the pairs below are of the seeds that both have.")
    stdout.print("chance, ceiling: the best guess from no tokens, and from the last ones alone.")
    if any(summary["pairs"].values()):
        stdout.print("What resonance adds past the training length, paired by seed: Student's 95 %")
        stdout.print("interval; p, adjusted for all rows (Holm).")
        stdout.print(_pairs(summary["pairs"]))


def _pairs(pairs: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=22)
    for name in ("encoding", "seeds", "difference", "interval", "p"):
        table.add_column(name, justify="left" if name == "encoding" else "right", no_wrap=True)
    for subtask, found in pairs.items():
        for reading, row in found.items():
            interval = "" if row["low"] is None else f"{row['low']:+.1f} to {row['high']:+.1f}"
            p = "" if row["p_holm"] is None else f"{row['p_holm']:.3f}"
            table.add_row(subtask, reading, str(row["seeds"]), f"{row['difference']:+.1f}", interval, p)
    return table
