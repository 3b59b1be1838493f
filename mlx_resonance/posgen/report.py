"""PosGen's report: means over seeds beside the paper's Table 1, and what resonance changes, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..run_log import Record
from .settings import BASES, ENCODINGS
from .tasks import SUBTASKS

# arXiv 2403.00071v2, Table 1: accuracy in % past the training length, mean of 5 seeds.
PAPER = {
    "recursive": {"rope": 65.29, "resonance_rope": 62.64, "yarn": 95.93, "resonance_yarn": 98.30},
    "cot": {"rope": 69.56, "resonance_rope": 75.25, "yarn": 98.71, "resonance_yarn": 99.58},
    "semi-recursive": {"rope": 17.96, "resonance_rope": 29.78, "yarn": 33.70, "resonance_yarn": 48.46},
}
RESAMPLES = 10_000


def summarize(lines: Sequence[Record]) -> dict[str, Any]:
    """Summarize the lines of one run log, accuracies in %.

    Returns:
        `table`: per subtask and encoding, the number of seeds, the mean accuracy in distribution; mean, sample standard
        deviation and sample variance out of distribution; mean accuracies of generated text; the paper's mean.
        `pairs`: per subtask and base encoding, the mean over seeds of resonance minus plain, out of distribution,
        with the ends of a 95 % interval. What needs two seeds is None with one.
    """
    table: dict[str, Any] = {}
    pairs: dict[str, Any] = {}
    for subtask in (name for name in SUBTASKS if any(line["subtask"] == name for line in lines)):
        by_encoding = {
            encoding: {
                line["seed"]: line for line in lines if (line["subtask"], line["encoding"]) == (subtask, encoding)
            }
            for encoding in ENCODINGS
        }
        table[subtask] = {
            encoding: _statistics(list(by_seed.values())) | {"paper": PAPER[subtask].get(encoding)}
            for encoding, by_seed in by_encoding.items()
            if by_seed
        }
        pairs[subtask] = {}
        for base in BASES:
            plain, resonant = by_encoding[base], by_encoding[f"resonance_{base}"]
            seeds = sorted(set(plain) & set(resonant))
            if seeds:
                differences = [100 * (resonant[seed]["ood"] - plain[seed]["ood"]) for seed in seeds]
                pairs[subtask][base] = paired_bootstrap(np.array(differences))
    return {"table": table, "pairs": pairs}


def paired_bootstrap(differences: NDArray[np.float64]) -> dict[str, Any]:
    """The mean difference and its 95 % percentile interval, by resampling the seeds with replacement.

    Args:
        differences: one per seed, shape (N,).

    Returns:
        `seeds`, `difference`, `low` and `high`; the last two are None with fewer than two seeds.
    """
    seeds = len(differences)
    result: dict[str, Any] = {"seeds": seeds, "difference": float(differences.mean()), "low": None, "high": None}
    if seeds > 1:
        drawn = np.random.default_rng(0).integers(0, seeds, size=(RESAMPLES, seeds))
        low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
        result |= {"low": float(low), "high": float(high)}
    return result


def accuracy_curves(lines: Sequence[Record]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Teacher-forced accuracy per predicted position in [0, 1], mean over seeds, by subtask and encoding."""
    curves: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for line in lines:
        curve = np.array(line["correct"]) / line["rows"]
        curves.setdefault(line["subtask"], {}).setdefault(line["encoding"], []).append(curve)
    return {
        subtask: {encoding: np.mean(found[encoding], axis=0) for encoding in ENCODINGS if encoding in found}
        for subtask, found in ((name, curves[name]) for name in SUBTASKS if name in curves)
    }


def _statistics(lines: Sequence[Record]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return float(np.mean([100 * line[name] for line in lines]))

    ood = np.array([100 * line["ood"] for line in lines])
    several = len(lines) > 1
    return {
        "seeds": len(lines),
        "id": mean("id"),
        "ood": float(ood.mean()),
        "ood_std": float(ood.std(ddof=1)) if several else None,
        "ood_variance": float(ood.var(ddof=1)) if several else None,
        "generated_id": mean("generated_id"),
        "generated_ood": mean("generated_ood"),
        "continued_ood": mean("continued_ood"),
    }
