"""Time PosGen's training step and the making of its data beside PyTorch and a loop.

    python benchmarks/posgen_step.py [--preset laptop] [--rounds 5] [--steps 10] [--threads 2]

The same model, weights and batch in MLX (`mlx_resonance.training.train`, whose step is compiled, with OneCycleAdamW)
and in PyTorch (AdamW and OneCycleLR): with attention written out; with torch's own attention and fused AdamW; and, with
--torch-compile, that one compiled. They take turns; figures are medians of the rounds, ratios medians of the rounds'
ratios. PyTorch runs on the same kind of device as MLX. Then the official table of sequences, against a Python loop over
its rows. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations, cycle, islice
from typing import Any

from mlx_resonance.posgen.data import make_table, tokens
from mlx_resonance.posgen.model import Decoder, ModelConfig
from mlx_resonance.posgen.settings import DROPOUT_KEYS, PRESETS, Reading, Settings
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

TASK, ENCODING = Task("cot"), Reading("rope")
WARM_UP = 3  # steps before the clock starts: MLX traces and compiles in the first one
SCHEDULE = 10_000  # steps of the learning-rate schedule; a benchmark does fewer
ROWS, LENGTH = 12_000, 512  # of the official table

# Trains for some steps and returns the seconds per step.
Contender = Callable[[int], float]


class TorchLayer(torch.nn.Module):
    """A layer of the decoder in PyTorch: self-attention, then a feed-forward, each after a norm."""

    def __init__(self, shape: ModelConfig, fused: bool) -> None:
        super().__init__()
        self.shape, self.fused = shape, fused
        dims, inner = shape.hidden_size, shape.heads * shape.head_dim
        self.attention_norm, self.feed_forward_norm = (torch.nn.RMSNorm(dims, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v = (torch.nn.Linear(dims, inner, bias=False) for _ in range(3))
        self.o = torch.nn.Linear(inner, dims, bias=False)
        self.wi = torch.nn.Linear(dims, shape.intermediate_size, bias=False)
        self.wo = torch.nn.Linear(shape.intermediate_size, dims, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x and the result of shape (B, L, D); cos and sin of shape (L, pairs)."""
        rate = self.shape.dropout if self.training else 0.0
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True, scale=1.0)
        else:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            weights = F.softmax((q @ k.transpose(-1, -2)).masked_fill(future, -torch.inf), dim=-1)
            mixed = F.dropout(weights, rate) @ v
        x = x + F.dropout(self.o(mixed.transpose(1, 2).flatten(2)), rate)
        return x + F.dropout(self.wo(F.dropout(F.relu(self.wi(self.feed_forward_norm(x))), rate)), rate)


class TorchDecoder(torch.nn.Module):
    """The decoder in PyTorch, with the weights of ours and the angles of `ENCODING`."""

    def __init__(self, settings: Settings, ours: Decoder, fused: bool) -> None:
        super().__init__()
        self.shape = shape = settings.model
        self.embedding = torch.nn.Embedding(*ours.embedding.shape)
        self.layers = torch.nn.ModuleList(TorchLayer(shape, fused) for _ in range(shape.layers))
        self.norm = torch.nn.RMSNorm(shape.hidden_size, eps=1e-6)
        weights = {}
        for name, array in tree_flatten(ours.parameters()):
            name = name.replace("attention.", "").replace("feed_forward.", "").removesuffix(".weight")
            tensor = torch.tensor(np.array(array))
            is_linear = name.rpartition(".")[-1] in ("q", "k", "v", "o", "wi", "wo")
            weights[f"{name}.weight"] = tensor.T.contiguous() if is_linear else tensor
        self.load_state_dict(weights)
        for layer in self.layers if not shape.train_feed_forward else ():
            for part in (layer.feed_forward_norm, layer.wi, layer.wo):
                part.requires_grad_(False)
        turns = np.arange(settings.train_length)[:, None] / settings.frequencies(ENCODING, scaled=False).wavelengths
        self.register_buffer("cos", torch.tensor(np.cos(2 * np.pi * turns)).float(), persistent=False)
        self.register_buffer("sin", torch.tensor(np.sin(2 * np.pi * turns)).float(), persistent=False)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after tokens of shape (B, L), from position `start` on."""
        drop = partial(F.dropout, p=self.shape.dropout, training=self.training)
        x = drop(self.embedding(tokens))
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = drop(self.norm(x[:, start:]))
        return F.linear(x * x.shape[-1] ** -0.5, self.embedding.weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring features (2i, 2i + 1) of x, shape (B, H, L, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def batch(settings: Settings) -> np.ndarray:
    """Token ids of a training batch, shape (B, 1 + L)."""
    return tokens(make_table(TASK, "disjoint", settings.batch_size, settings.train_length), TASK.modulus)


def ours(settings: Settings, ids: np.ndarray) -> tuple[Contender, Decoder]:
    """Our training, as `posgen.train.run_training` sets it up, on one batch again and again."""
    run = Run(TASK, settings, (ENCODING,), 0)
    model, rope, start = run.model(), run.training_rope(), TASK.seed_length
    optimizer = OneCycleAdamW(settings.learning_rate, SCHEDULE, weight_decay=settings.weight_decay)
    rows = mx.array(ids)

    def loss(model: Decoder, ids: mx.array, key: mx.array) -> mx.array:
        logits = model(ids[:, :-1], rope, dropout_key=key, start=start)
        return nn.losses.cross_entropy(logits, ids[:, start + 1 :], reduction="mean")

    def data(step: int) -> tuple[mx.array, mx.array]:
        return rows, mx.array([run.seed, DROPOUT_KEYS * step], dtype=mx.uint32)

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
    model = TorchDecoder(settings, ours, fused).to(device)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, SCHEDULE, pct_start=0.1)
    forward: Any = torch.compile(model) if compiled else model
    start = TASK.seed_length
    inputs = torch.tensor(ids[:, :-1]).to(device)
    targets = torch.tensor(ids[:, start + 1 :]).long().flatten().to(device)

    def contender(steps: int) -> float:
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                begin = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(inputs, start).flatten(0, 1), targets)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss.item()  # ours looks at every loss, too
        return (time.perf_counter() - begin) / steps

    return contender


def first_losses(settings: Settings, ours: Decoder, ids: np.ndarray) -> list[float]:
    """The loss before any step without dropout, of ours and of both in PyTorch: they are the same model."""
    start = TASK.seed_length
    rope = Run(TASK, settings, (ENCODING,), 0).training_rope()
    logits = ours(mx.array(ids[:, :-1]), rope, start=start)
    losses = [nn.losses.cross_entropy(logits, mx.array(ids[:, start + 1 :]), reduction="mean").item()]
    for fused in (False, True):
        model = TorchDecoder(settings, ours, fused).eval()
        with torch.no_grad():
            other = model(torch.tensor(ids[:, :-1]), start).flatten(0, 1)
            losses.append(F.cross_entropy(other, torch.tensor(ids[:, start + 1 :]).long().flatten()).item())
    return losses


def in_turns(contenders: dict[str, Contender], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step, by contender and round; every other round takes them in reverse."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            seconds[name].append(contenders[name](steps))
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def steps_per_second(settings: Settings, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Ours beside PyTorch."""
    ids = batch(settings)
    mlx, model = ours(settings, ids)
    losses = first_losses(settings, model, ids)
    if max(losses) - min(losses) > 1e-5 * max(losses):
        raise SystemExit(f"the models differ: their first losses are {losses}")
    contenders = {"mlx": mlx, "torch": theirs(settings, model, ids, device, fused=False, compiled=False)}
    contenders["torch_fused"] = theirs(settings, model, ids, device, fused=True, compiled=False)
    if arguments.torch_compile:
        contenders["torch_compiled"] = theirs(settings, model, ids, device, fused=True, compiled=True)
    seconds = in_turns(contenders, arguments.rounds, arguments.steps)
    report: dict[str, Any] = {"first_losses": [round(value, 6) for value in losses]}
    report["steps_per_second"] = {name: round(1 / statistics.median(values), 3) for name, values in seconds.items()}
    report["mlx_to"] = {name: ratio(values, seconds["mlx"]) for name, values in seconds.items() if name != "mlx"}
    return report


def row_by_row(subtask: str, rows: int) -> list[list[int]]:
    """The first rows of the official table, token by token, as the task is defined."""
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
    """Seconds for the whole official table; those of the loop are extrapolated from its rows."""
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
    """Restart the process if the BLAS has another number of threads: it reads the number when it is loaded."""
    wanted = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["laptop", "paper", "official"], default="laptop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch and OpenBLAS")
    parser.add_argument("--loop-rows", type=int, default=300, help="rows that the loop makes")
    parser.add_argument("--torch-compile", action="store_true", help="time compiled PyTorch, too")
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
