"""PosGen's report: means over seeds beside the paper's Table 1, and what resonance changes, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..run_log import Record
from .bounds import bounds
from .settings import BASES, Reading, Settings, settings_from
from .tasks import SUBTASKS, Task

# arXiv 2403.00071v2, Table 1: accuracy in % past the training length, mean of 5 seeds.
PAPER = {
    "recursive": {"rope": 65.29, "resonance_rope": 62.64, "yarn": 95.93, "resonance_yarn": 98.30},
    "cot": {"rope": 69.56, "resonance_rope": 75.25, "yarn": 98.71, "resonance_yarn": 99.58},
    "semi-recursive": {"rope": 17.96, "resonance_rope": 29.78, "yarn": 33.70, "resonance_yarn": 48.46},
}
PAPER_LENGTHS = 64, 256  # digits to train and to test on; its rule is that of `Task` by default
BAR = 99.0  # %: a model below it, within the training length, has not learned its task
WEIGHTS = ("best", "last")
GENERATED = ("generated_id", "generated_ood", "continued_ood")


def summarize(header: Record, lines: Sequence[Record], weights: str = "best") -> dict[str, Any]:
    """Summarize the lines of one run log, accuracies in %.

    Args:
        header, lines: of the run log.
        weights: `best` (on validation) or `last` (after the last step), with which no text was generated.

    Returns:
        `bounds`: per subtask and kind of token, and for `all`, what a constant and a guess without far tokens reach
        past the training length (see `bounds`).
        `table`: per subtask and reading, the number of seeds and of those `below` the bar of 99 % within the training
        length; `trained_least` and `trained_most`, the `trained_id` of the worst and of the best seed; mean accuracies
        within it, with the angles of the training (`first` prediction, `trained_id`, the others, of them `trained_near`
        and `trained_far` tokens) and with the scaled ones (`id`); past it, mean (`ood`), sample standard deviation and
        variance, `near` and `far` tokens; of generated text; the paper's mean.
        `pairs`: per subtask and reading of a base encoding, resonance minus plain past the training length, paired by
        seed (see `paired`), with `p_holm`, adjusted for all pairs of the table. What has no value is None.
        `same_seeds`: per subtask, whether all readings are means over the same seeds.

    Raises:
        UsageError: a line has no weights of the last step.
    """
    settings = settings_from(header["settings"])
    report: dict[str, Any] = {"bounds": {}, "table": {}, "pairs": {}, "same_seeds": {}}
    for subtask in (name for name in SUBTASKS if any(line["subtask"] == name for line in lines)):
        task = Task(subtask, **header["task"])
        kinds = task.kinds(settings.test_length)
        inside, outside = np.split(kinds, [settings.train_length - task.seed_length])
        report["bounds"][subtask] = _bounds(task, settings.test_length, outside)
        found: dict[Reading, dict[int, Record]] = {}
        for line in lines:
            if line["subtask"] == subtask:
                measured = weights_of(line, weights)
                reading = Reading(line["encoding"], line["ramp"])
                found.setdefault(reading, {})[line["seed"]] = measured | _by_kind(measured, inside, outside)
        order = sorted(found, key=_order)
        report["same_seeds"][subtask] = len({frozenset(of) for of in found.values()}) == 1
        report["table"][subtask] = {
            str(reading): _statistics(list(found[reading].values()))
            | {"paper": paper_of(task, settings, reading.encoding)}
            for reading in order
        }
        report["pairs"][subtask] = {}
        for plain in (reading for reading in order if reading.encoding in BASES):
            resonant = found.get(plain._replace(encoding=f"resonance_{plain.encoding}"), {})
            seeds = sorted(set(found[plain]) & set(resonant))
            if seeds:
                differences = [100 * (resonant[seed]["ood"] - found[plain][seed]["ood"]) for seed in seeds]
                report["pairs"][subtask][str(plain)] = paired(np.array(differences))
    adjust([pair for pairs in report["pairs"].values() for pair in pairs.values()])
    return report


def paper_of(task: Task, settings: Settings, encoding: str) -> float | None:
    """The paper's mean accuracy in % past the training length; None for what it has not: other rules or lengths."""
    same = task == Task(task.subtask) and (settings.train_length, settings.test_length) == PAPER_LENGTHS
    return PAPER[task.subtask].get(encoding) if same else None


def paired(differences: NDArray[np.float64]) -> dict[str, Any]:
    """The mean of paired differences with Student's 95 % interval and p-value.

    Args:
        differences: one per seed, shape (N,).

    Returns:
        `seeds`, `difference`, `low`, `high` and `p`; the last three are None with fewer than two seeds, or if all
        differences are the same, but that `p` is 1 if they are all 0.
    """
    result: dict[str, Any] = {"seeds": len(differences), "difference": float(differences.mean())}
    result |= {"low": None, "high": None, "p": None}
    if len(differences) > 1 and not differences.any():
        result["p"] = 1.0
    elif len(differences) > 1 and np.ptp(differences) > 1e-9 * np.abs(differences).max():
        from scipy import stats  # takes a second to import

        test = stats.ttest_rel(differences, np.zeros(len(differences)))
        low, high = test.confidence_interval(0.95)
        result |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return result


def adjust(pairs: Sequence[dict[str, Any]]) -> None:
    """Give each pair `p_holm`: its p-value, adjusted for all pairs of two seeds or more. Source: Holm 1979."""
    count = sum(pair["seeds"] > 1 for pair in pairs)  # those without a p-value are comparisons, too
    tested = sorted((pair for pair in pairs if pair["p"] is not None), key=lambda pair: pair["p"])
    adjusted = 0.0
    for rank, pair in enumerate(tested):
        adjusted = max(adjusted, min(1.0, (count - rank) * pair["p"]))
        pair["p_holm"] = adjusted
    for pair in pairs:
        pair.setdefault("p_holm", None)


def accuracy_curves(lines: Sequence[Record]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Teacher-forced accuracy per predicted position in [0, 1], mean over seeds, by subtask and reading."""
    curves: dict[str, dict[Reading, list[NDArray[np.float64]]]] = {}
    for line in lines:
        curve = np.array(line["correct"]) / line["rows"]
        reading = Reading(line["encoding"], line["ramp"])
        curves.setdefault(line["subtask"], {}).setdefault(reading, []).append(curve)
    return {
        subtask: {
            str(reading): np.mean(curves[subtask][reading], axis=0) for reading in sorted(curves[subtask], key=_order)
        }
        for subtask in SUBTASKS
        if subtask in curves
    }


def figure_of(header: Record, lines: Sequence[Record], weights: str = "best") -> tuple[Any, ...]:
    """What `plots.plot_posgen` draws of a run log: its arguments but the path."""
    settings, table = settings_from(header["settings"]), summarize(header, lines, weights)["table"]
    tasks = {subtask: Task(subtask, **header["task"]) for subtask in table}
    curves = accuracy_curves([weights_of(line, weights) for line in lines])
    kinds = {subtask: task.kinds(settings.test_length) for subtask, task in tasks.items()}
    faint = {subtask: {name for name, row in rows.items() if below_bar(row)} for subtask, rows in table.items()}
    start = header["task"]["near"] + header["task"]["far"]
    return curves, kinds, faint, start, settings.train_length


def has_learned(line: Record) -> bool:
    """Whether a model, a line of a run log, is known to meet the bar of 99 % within the training length."""
    return 100 * float(line.get("trained_id", 0)) >= BAR


def below_bar(row: dict[str, Any]) -> bool:
    """Whether a row of the table has a seed that did not learn its task, or none that was measured."""
    return row["below"] is None or row["below"] > 0


def _order(reading: Reading) -> tuple[int, int, bool]:
    base = reading.encoding.removeprefix("resonance_")
    return BASES.index(base), reading.ramp, reading.encoding != base


def weights_of(line: Record, weights: str) -> Record:
    """A line of a run log with the results of those weights in place. Raises UsageError as `summarize`."""
    if weights != "last":
        return line
    if "last" not in line:
        raise UsageError("these results have only the best weights, not those of the last step", option="weights")
    return line | line["last"] | dict.fromkeys(GENERATED)


def _bounds(task: Task, length: int, outside: NDArray[np.str_]) -> dict[str, dict[str, float]]:
    """Those of each kind of token that occurs past the training length, and of all of them, in %."""
    measured = bounds(task, length)
    shares = {str(kind): float((outside == kind).mean()) for kind in np.unique(outside)}
    result = {kind: {name: 100 * value for name, value in measured[kind].items()} for kind in shares}
    names = ("chance", "ceiling")
    result["all"] = {name: sum(share * result[kind][name] for kind, share in shares.items()) for name in names}
    return result


def _by_kind(line: Record, inside: NDArray[np.str_], outside: NDArray[np.str_]) -> Record:
    """Accuracy on near and far tokens past the training length and (`trained_`) within it; None where unknown."""
    parts = (("", outside, line["correct"][len(inside) :]), ("trained_", inside, line.get("trained", [])))
    return {
        prefix + kind: float(np.array(counts)[kinds == kind].mean() / line["rows"])
        if counts and kind in kinds
        else None
        for prefix, kinds, counts in parts
        for kind in ("near", "far")
    }


def _statistics(lines: Sequence[Record]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return 100 * float(np.mean(values)) if len(values) == len(lines) else None

    ood = 100 * np.array([line["ood"] for line in lines])
    learned = [100 * line["trained_id"] for line in lines if "trained_id" in line]
    return {
        "seeds": len(lines),
        "below": sum(not has_learned(line) for line in lines) if len(learned) == len(lines) else None,
        "trained_least": min(learned, default=None),
        "trained_most": max(learned, default=None),
        **{name: mean(name) for name in ("trained_id", "trained_near", "trained_far", "first", "id", "near", "far")},
        "ood": float(ood.mean()),
        "ood_std": float(ood.std(ddof=1)) if len(lines) > 1 else None,
        "ood_variance": float(ood.var(ddof=1)) if len(lines) > 1 else None,
        **{name: mean(name) for name in GENERATED},
    }
