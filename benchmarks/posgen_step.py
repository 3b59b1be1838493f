"""Time PosGen's training step beside PyTorch, seeds together beside one after the other, and the making of the data.

    python benchmarks/posgen_step.py [--preset laptop] [--rounds 5] [--steps 10] [--threads 2] [--seeds 5]

The same model, weights and batch in MLX (`mlx_resonance.training.train`, whose step is compiled, with OneCycleAdamW)
and in PyTorch (tests/posgen_torch.py with AdamW and OneCycleLR): written out, with torch's own attention and fused
AdamW, and with --torch-compile also that compiled. All take turns; figures are medians of the rounds, ratios medians
of the rounds' ratios. PyTorch runs on the kind of device that MLX runs on. Then --seeds decoders stacked in one model
against the same ones after each other, and the official table of sequences against a loop over its rows in Python.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations, cycle, islice
from pathlib import Path
from typing import Any

from mlx_resonance.posgen.data import make_table, tokens
from mlx_resonance.posgen.model import Decoder
from mlx_resonance.posgen.settings import DROPOUT_KEYS, PRESETS, Settings
from mlx_resonance.posgen.tasks import SUBTASKS, Task
from mlx_resonance.posgen.train import Run
from mlx_resonance.training import OneCycleAdamW, train

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle
import posgen_torch

TASK, ENCODING = Task("cot"), "rope"
WARM_UP = 3  # steps before the clock starts: MLX traces and compiles in the first one
SCHEDULE = 10_000  # steps that the learning rate is planned for; a benchmark does fewer
ROWS, LENGTH = 12_000, 512  # of the official table

# Trains for some steps and gives the seconds that one took.
Contender = Callable[[int], float]


def batch(settings: Settings) -> np.ndarray:
    """Token ids of a training batch, shape (B, 1 + L)."""
    return tokens(make_table(TASK, "disjoint", settings.batch_size, settings.train_length), TASK.modulus)


def ours(settings: Settings, seeds: Sequence[int], ids: np.ndarray) -> tuple[Contender, Decoder]:
    """Our training, as `posgen.train.run_training` sets it up, on one batch over and over."""
    run = Run(TASK, settings, (ENCODING,), tuple(seeds))
    model, rope, start = run.model(), run.rope(ENCODING, scaled=False), TASK.seed_length
    optimizer = OneCycleAdamW(settings.learning_rate, SCHEDULE, weight_decay=settings.weight_decay)
    stacked = mx.array(np.broadcast_to(ids, (len(seeds), *ids.shape)))

    def loss(model: Decoder, ids: mx.array, keys: mx.array) -> mx.array:
        logits = model(ids[..., :-1], rope, dropout_keys=keys, start=start)
        return nn.losses.cross_entropy(logits, ids[..., start + 1 :]).mean(axis=(1, 2)).sum()

    def data(step: int) -> tuple[mx.array, mx.array]:
        return stacked, mx.array(np.array([[seed, DROPOUT_KEYS * step] for seed in seeds], dtype=np.uint32))

    def contender(steps: int) -> float:
        ends: list[float] = []
        train(
            model, optimizer, loss, data, WARM_UP + steps, max_grad_norm=None,
            on_step=lambda *_: ends.append(time.perf_counter()),
        )  # fmt: skip
        return (ends[-1] - ends[WARM_UP - 1]) / steps

    return contender, model


def theirs(settings: Settings, ours: Decoder, ids: np.ndarray, device: str, fused: bool, compiled: bool) -> Contender:
    """The same in PyTorch, from the same weights."""
    model = posgen_torch.Decoder(settings.model, TASK.modulus + 5, fused)
    model.load_state_dict(posgen_torch.translated(tree_flatten(ours.parameters()), 0))
    model.to(device)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, SCHEDULE, pct_start=0.1)
    forward: Any = torch.compile(model) if compiled else model
    start = TASK.seed_length
    inputs = torch.tensor(ids[:, :-1]).to(device)
    targets = torch.tensor(ids[:, start + 1 :]).long().flatten().to(device)
    wavelengths = oracle.rope_wavelengths(settings.model.head_dim, settings.base)
    cos, sin = (table.to(device) for table in posgen_torch.tables(oracle.angles(range(inputs.shape[1]), wavelengths)))

    def contender(steps: int) -> float:
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                begin = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(inputs, cos, sin, start).flatten(0, 1), targets)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss.item()  # ours looks at every loss, too
        return (time.perf_counter() - begin) / steps

    return contender


def first_losses(settings: Settings, ours: Decoder, ids: np.ndarray) -> list[float]:
    """The loss before any step without dropout, ours and PyTorch's: the two are the same model."""
    start = TASK.seed_length
    rope = Run(TASK, settings, (ENCODING,), (0,)).rope(ENCODING, scaled=False)
    logits = ours(mx.array(ids[None, :, :-1]), rope, start=start)
    mine = nn.losses.cross_entropy(logits, mx.array(ids[None, :, start + 1 :])).mean().item()
    model = posgen_torch.Decoder(settings.model, TASK.modulus + 5).eval()
    model.load_state_dict(posgen_torch.translated(tree_flatten(ours.parameters()), 0))
    wavelengths = oracle.rope_wavelengths(settings.model.head_dim, settings.base)
    with torch.no_grad():
        cos, sin = posgen_torch.tables(oracle.angles(range(ids.shape[1] - 1), wavelengths))
        logits = model(torch.tensor(ids[:, :-1]), cos, sin, start)
        other = F.cross_entropy(logits.flatten(0, 1), torch.tensor(ids[:, start + 1 :]).long().flatten()).item()
    return [mine, other]


def in_turns(contenders: dict[str, Contender], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step, by contender and round; every other round goes the other way round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            seconds[name].append(contenders[name](steps))
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def steps_per_second(settings: Settings, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Ours beside PyTorch, one decoder."""
    ids = batch(settings)
    mlx, model = ours(settings, [0], ids)
    losses = first_losses(settings, model, ids)
    if abs(losses[0] - losses[1]) > 1e-5 * losses[1]:
        raise SystemExit(f"the two models differ: their first losses are {losses[0]} and {losses[1]}")
    contenders = {"mlx": mlx, "torch": theirs(settings, model, ids, device, fused=False, compiled=False)}
    contenders["torch_fused"] = theirs(settings, model, ids, device, fused=True, compiled=False)
    if arguments.torch_compile:
        contenders["torch_compiled"] = theirs(settings, model, ids, device, fused=True, compiled=True)
    seconds = in_turns(contenders, arguments.rounds, arguments.steps)
    report: dict[str, Any] = {"first_losses": [round(value, 6) for value in losses]}
    report["steps_per_second"] = {name: round(1 / statistics.median(values), 3) for name, values in seconds.items()}
    report["mlx_to"] = {name: ratio(values, seconds["mlx"]) for name, values in seconds.items() if name != "mlx"}
    return report


def together(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decoders stacked in one model against one after the other, in steps per second and decoder."""
    count, ids = arguments.seeds, batch(settings)
    alone = [ours(settings, [seed], ids)[0] for seed in range(count)]
    contenders = {
        "stacked": ours(settings, range(count), ids)[0],
        "one_after_the_other": lambda steps: sum(contender(steps) for contender in alone),
    }
    seconds = in_turns(contenders, arguments.rounds, arguments.steps)  # until each of the decoders has done a step
    report: dict[str, Any] = {name: round(count / statistics.median(values), 3) for name, values in seconds.items()}
    return {"seeds": count} | report | {"ratio": ratio(seconds["one_after_the_other"], seconds["stacked"])}


def row_by_row(subtask: str, rows: int) -> list[list[int]]:
    """The first rows of the official table, a token after the other, as the task is defined."""
    table, near, far = [], TASK.near, TASK.far
    for seed in islice(cycle(combinations(range(TASK.modulus), near + far)), rows):
        row = list(seed)
        while len(row) < LENGTH:
            done = len(row) - near - far
            first = {"recursive": done, "cot": 0, "semi-recursive": done // 2}[subtask]
            row.append((sum(row[first : first + far]) + sum(row[-near:])) % TASK.modulus)
        table.append(row)
    return table


def data(rounds: int, loop_rows: int) -> dict[str, Any]:
    """Seconds for the whole official table; the loop's are scaled up from its rows."""
    report: dict[str, Any] = {"rows": ROWS, "length": LENGTH, "loop_rows": loop_rows}
    for subtask in SUBTASKS:
        seconds: dict[str, list[float]] = {"vectorised": [], "loop_scaled": []}
        for _ in range(rounds):
            begin = time.perf_counter()
            table = make_table(Task(subtask), "official", ROWS, LENGTH)
            middle = time.perf_counter()
            rows = row_by_row(subtask, loop_rows)
            seconds["vectorised"].append(middle - begin)
            seconds["loop_scaled"].append((time.perf_counter() - middle) * ROWS / loop_rows)
        if not np.array_equal(table[:loop_rows], rows):
            raise SystemExit(f"the two tables of {subtask} differ")
        report[subtask] = {name: round(statistics.median(values), 5) for name, values in seconds.items()}
        report[subtask]["times_as_fast"] = round(ratio(seconds["loop_scaled"], seconds["vectorised"]), 1)
    return report


def with_threads(threads: int) -> None:
    """Start anew where the BLAS has another number of threads: it reads it when it is loaded, before this runs."""
    wanted = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["laptop", "paper", "official"], default="laptop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch and of OpenBLAS")
    parser.add_argument("--seeds", type=int, default=5, help="decoders to train side by side; 0 leaves this out")
    parser.add_argument("--loop-rows", type=int, default=300, help="rows of the table that the loop makes")
    parser.add_argument("--torch-compile", action="store_true", help="PyTorch compiled, too")
    arguments = parser.parse_args()
    with_threads(arguments.threads)
    settings = PRESETS[arguments.preset]
    on_cpu = mx.default_device().type == mx.cpu
    device = "cpu" if on_cpu else "mps" if torch.backends.mps.is_available() else "cuda"
    report: dict[str, Any] = {
        "preset": arguments.preset, "mlx": mx.__version__, "mlx_device": str(mx.default_device()),
        "torch": torch.__version__, "torch_device": device, "machine": platform.machine(),
        "threads": {"torch": torch.get_num_threads(), "openblas": int(os.environ["OPENBLAS_NUM_THREADS"])},
        "rounds": arguments.rounds, "steps": arguments.steps, "batch": [settings.batch_size, settings.train_length],
    }  # fmt: skip
    console = Console(width=120)
    report["speed"] = speed = steps_per_second(settings, arguments, device)
    table = Table(f"training, preset {arguments.preset}", "steps/s", "MLX is … times as fast")
    for name, value in speed["steps_per_second"].items():
        table.add_row(name.replace("_", " "), f"{value:.3g}", str(speed["mlx_to"].get(name, "")))
    console.print(table)
    if arguments.seeds:
        report["together"] = found = together(settings, arguments)
        console.print(
            f"{found['seeds']} decoders, steps/s, each one's counted: stacked {found['stacked']:.3g}, one after the "
            f"other {found['one_after_the_other']:.3g}; stacked is {found['ratio']} times as fast"
        )
    report["data"] = made = data(arguments.rounds, arguments.loop_rows)
    for subtask in SUBTASKS:
        row = made[subtask]
        console.print(
            f"{ROWS} × {LENGTH} tokens, {subtask}: {1000 * row['vectorised']:.3g} ms; a loop over rows (scaled up from "
            f"{arguments.loop_rows}) {row['loop_scaled']:.3g} s, {row['times_as_fast']} times as long"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
