"""Train the models of PosGen's table in the docs: what its run logs lack; with all of them there, nothing.

    python benchmarks/posgen_train.py [--folder benchmarks/results] [posgen-shortcut …]

A killed run resumes, and processes with different logs may run at the same time. `posgen.py` makes the table. The last
line is one JSON object with the number of results of each log.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_resonance.errors import check_option
from mlx_resonance.posgen.settings import PRESETS, Settings, sweep_seeds
from mlx_resonance.posgen.sweep import run_sweep
from mlx_resonance.posgen.tasks import SUBTASKS, Task
from mlx_resonance.posgen.train import Progress, Run

from reporting import exit_with

FOLDER = Path(__file__).parent / "results"
TASK = Task(SUBTASKS[0])  # the paper's, of every subtask
PAIRS = ("rope", "resonance_rope", "ntk", "resonance_ntk", "yarn", "resonance_yarn")
EVERY = {"recursive": 5, "cot": 5, "semi-recursive": 10}


class Sweep(NamedTuple):
    """What a run log has.

    Attributes:
        preset: its name.
        seeds: number of seeds by subtask.
        changes: of the preset's settings.
        encodings: those that are read.
    """

    preset: str
    seeds: Mapping[str, int]
    changes: Mapping[str, Any] = {}
    encodings: tuple[str, ...] = PAIRS

    @property
    def settings(self) -> Settings:
        """The preset's, changed."""
        return replace(PRESETS[self.preset], **self.changes)

    def keys(self) -> Iterator[tuple[str, str, int, int]]:
        """Subtask, encoding, ramp and seed of every result."""
        for subtask, count in self.seeds.items():
            for reading in self.settings.readings(self.encodings):
                yield from ((subtask, *reading, seed) for seed in sweep_seeds(count))


SWEEPS = {
    "posgen-learned": Sweep("learned", {"semi-recursive": 10}),
    "posgen-learned-official": Sweep("learned", {"semi-recursive": 2}, {"split": "official"}),
    "posgen-official-small": Sweep("official-small", {"semi-recursive": 2}),
    "posgen-shortcut": Sweep("shortcut", EVERY),
    "posgen-shortcut-official": Sweep("shortcut", EVERY, {"split": "official"}),
    "posgen-shortcut-train-scaled": Sweep(
        "shortcut", {"semi-recursive": 5}, {"train_scaled": True, "ramps": (65,)}, ("yarn", "resonance_yarn")
    ),
}


def train(name: str, folder: Path) -> int:
    """Complete a run log; returns its number of results."""
    sweep, count = SWEEPS[name], 0

    def on_run(run: Run, number: int, of: int) -> Progress | None:
        print(f"{name}: {run.task.subtask}, {run.readings[0]}, seed {run.seed}: {number} of {of}", file=sys.stderr)
        return None

    for subtask, seeds in sweep.seeds.items():
        lines = run_sweep(
            folder / f"{name}.jsonl", sweep.preset, sweep.settings, TASK, subtasks=[subtask],
            encodings=sweep.encodings, seeds=sweep_seeds(seeds), on_run=on_run,
        )  # fmt: skip
        count = len(lines)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(SWEEPS), help=f"of run logs: {', '.join(SWEEPS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the run logs are")
    args = parser.parse_args()
    for name in args.names:
        check_option("names", name in SWEEPS, f"one of {', '.join(SWEEPS)}", name)
    print(json.dumps({name: train(name, args.folder) for name in args.names}))


if __name__ == "__main__":
    exit_with(main)
