"""RULER's tasks at lengths in a model's own tokens: the longest examples that fit, or files that RULER has made."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError, check_option
from ..rope_types import LONGEST
from ..run_log import Record, check_field
from ..wired import wired
from .answers import Answers, summarize
from .prompts import Limits, Prompt, read_lines
from .ruler import DOWNLOADED, TASKS, made_essay
from .scorers import match_all, match_any
from .texts import read_text

KIND = "ruler"
METRICS = {"match all": match_all, "match any": match_any}
MOST = 10_000  # examples of a task at a length


@dataclass(frozen=True)
class RulerGrid:
    """What to ask.

    Args:
        tasks: names in `TASKS`.
        lengths: tokens of prompt and answer.
        samples: examples of each task at each length, at most 10 000.
        seed: of the examples.
        essay: sentences, the haystack of some tasks.
        chat: use the tokenizer's chat template, if it has one.
        max_tokens: of an answer, instead of the benchmark's budget for the task.

    Raises:
        UsageError: an argument is out of range, or a task is unknown.
    """

    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[int] = (4096,)
    samples: int = 20
    seed: int = 42
    essay: Sequence[str] = made_essay()
    chat: bool = True
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task in DOWNLOADED:
                raise UsageError(
                    f"{task} has questions that RULER downloads: it needs the file that RULER makes of them",
                    remedies=[{"data": None}],
                )
            if task not in TASKS:
                raise UsageError(f"no task is named {task!r}; known are {', '.join(TASKS)}", option="tasks")
        right = bool(self.lengths) and all(1 <= length <= LONGEST for length in self.lengths)
        check_option("lengths", right, "in [1, 2**31] tokens", list(self.lengths))
        check_option("samples", 1 <= self.samples <= MOST, f"in [1, {MOST}]", self.samples)

    def settings(self, tokenizer: TokenizerWrapper) -> Record:
        """What all answers have in common; more tasks, lengths and samples may follow."""
        digest = hashlib.sha256("\n".join(self.essay).encode()).hexdigest()[:16]
        chat = self.chat and tokenizer.has_chat_template
        return {"seed": self.seed, "haystack": digest, "max_tokens": self.max_tokens, "chat_template": chat}

    def cells(self) -> list[tuple[str, int, int]]:
        """Task, length and number of every example, the shortest first."""
        tasks, samples = dict.fromkeys(self.tasks), range(self.samples)
        return [(task, length, i) for length in sorted(set(self.lengths)) for task in tasks for i in samples]

    def budget(self, task: str) -> int:
        """Maximum number of tokens of an answer."""
        return self.max_tokens or TASKS[task].budget


def read_essay(path: Path) -> list[str]:
    """The sentences of a text file: each ends with a period, question or exclamation mark before a space.

    Raises:
        MissingFileError: there is no such file.
        UsageError: it is empty, or not UTF-8.
    """
    words = read_text(path, "haystack").split()
    if not words:
        raise UsageError(f"{path} is empty", option="haystack")
    return re.split(r"(?<=[.!?]) ", " ".join(words))


def make_prompt(tokenizer: TokenizerWrapper, grid: RulerGrid, task: str, length: int, index: int) -> Prompt:
    """The example of a task with an index, which counts from 0, as long as the length allows.

    Raises:
        UsageError: the length is too short for the smallest example of the task.
    """
    name, budget = f"{grid.seed} {task} {length} {index}", grid.budget(task)

    def prompt(size: int) -> Prompt:
        example = TASKS[task].make(random.Random(name), length, size, grid.essay)
        saved: Record = {"metric": "match all", "length": length, "references": example.references}
        return Prompt(task, f"{length}/{index}", example.text, "", "", budget, saved, start=example.start)

    def tokens(size: int) -> int:
        made = prompt(size)
        return len(made.tokens(tokenizer, made.before, grid.chat)) + budget

    least = TASKS[task].least
    if (needed := tokens(least)) > length:
        raise UsageError(
            f"{task} takes at least {needed} tokens with its answer, the length is {length}", option="lengths"
        )
    return prompt(largest(tokens, length, least))


def largest(tokens: Callable[[int], int], limit: int, least: int) -> int:
    """The largest size, `least` or more, that has at most `limit` tokens.

    Found by linear interpolation, in few steps: tokenizing a long text takes seconds.
    """
    low, high = least, 2 * least + 8
    few, many = tokens(low), tokens(high)
    while many <= limit:
        further = (limit - many) * (high - low) // max(1, many - few) + 1
        low, few, high = high, many, high + further
        many = tokens(high)
    tries = 0
    while high - low > 1:
        tries += 1
        step = (limit - few) * (high - low) // (many - few) if tries < 8 else (high - low) // 2
        guess = min(max(low + step, low + 1), high - 1)
        if (count := tokens(guess)) <= limit:
            low, few = guess, count
        else:
            high, many = guess, count
    return low


@wired()
def run_ruler(answers: Answers, grid: RulerGrid, on_answer: Callable[[Record], None] | None = None) -> list[Record]:
    """The answers to the examples of a grid; those that the run log does not have are made and asked.

    `on_answer` is called with every answer, new or not.
    """
    lines = []
    for task, length, index in grid.cells():
        line = answers.log.find(task, f"{length}/{index}")
        if line is None:
            prompt = make_prompt(answers.checkpoint.tokenizer, grid, task, length, index)
            line = answers.ask(prompt, Limits(length, chat=grid.chat))
        lines.append(line)
        if on_answer is not None:
            on_answer(line)
    return lines


def check_lengths(tokenizer: TokenizerWrapper, grid: RulerGrid) -> None:
    """Raise UsageError where a length is too short for a task."""
    for task in dict.fromkeys(grid.tasks):
        make_prompt(tokenizer, grid, task, min(grid.lengths), 0)


def make_prompts(paths: Sequence[Path], max_tokens: int | None = None) -> list[Prompt]:
    """The prompts of files that RULER has made.

    Args:
        paths: files of JSON lines, named after their task or in a folder of its name; a line has `input`, `outputs`,
            and `answer_prefix` if the input does not end with it.
        max_tokens: of an answer, instead of the benchmark's budget for the task.

    Raises:
        MissingFileError: there is no such file.
        UsageError: a task is unknown, or a line is wrong.
    """
    budgets = {name: task.budget for name, task in TASKS.items()} | DOWNLOADED
    prompts: dict[tuple[str, str], Prompt] = {}
    for path in paths:
        task = path.stem if path.stem in budgets else path.parent.name
        if task not in budgets:
            raise UsageError(f"{path}: file or folder must be named after a task: {', '.join(budgets)}", option="data")
        metric = "match any" if task in DOWNLOADED else "match all"
        for number, entry in read_lines(path, {"input": str, "outputs": list}):
            name, where = (task, str(number)), f"{path}, line {number}"
            start = check_field(where, {"answer_prefix": ""} | entry, "answer_prefix", str, option="data")
            if name in prompts:
                raise UsageError(f"{where}: another file is of the same task, {task}", option="data")
            saved: Record = {"metric": metric, "references": entry["outputs"]}
            budget = max_tokens or budgets[task]
            prompts[name] = Prompt(*name, entry["input"], "", "", budget, saved, start=start)
    return list(prompts.values())


def summary(lines: Sequence[Record]) -> list[Record]:
    """A row for each task and length, in percent."""

    def score(line: Record) -> dict[str, float]:
        return {line["metric"]: METRICS[line["metric"]](line["prediction"], line["references"])}

    return summarize(lines, score, [name for name in ("task", "length", "metric") if name in lines[0]])
