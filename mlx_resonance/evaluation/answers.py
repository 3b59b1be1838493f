"""Greedy answers to prompts, one after another, each saved as soon as it is there.

One by one and not in batches: the tokens of a long prompt fill a GPU by themselves, a second one needs its memory
again, and an answer in a batch depends in its last bits on its neighbours, so that a run that was killed would end
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation import stream_generate
from ..records import Record, append_records, open_records
from .checkpoint import Checkpoint
from .prompts import Limits, Prompt, fit
from .texts import check_results

FIELDS = {"task": str, "id": str, "metric": str, "digest": str, "prediction": str, "max_tokens": int, "truncated": bool}


def greedy(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    max_tokens: int,
    end: Callable[[str], int | None] | None = None,
    **options: Any,
) -> tuple[str, int, str]:
    """The likeliest token, one after another.

    Args:
        model, tokenizer: from `load`.
        tokens: of the prompt.
        max_tokens: most tokens of the answer.
        end: where a text ends, or None where it does not yet.
        options: of `stream_generate`.

    Returns:
        text, its number of tokens, "stop" or "length".
    """
    text, count, reason = "", 0, "length"
    stream: Any = stream_generate(model, tokenizer, tokens, max_tokens=max_tokens, **options)
    with closing(stream):
        for response in stream:
            text, count, reason = text + response.text, response.generation_tokens, response.finish_reason
            if end is not None and (stop := end(text)) is not None:
                return text[:stop], count, "stop"
    return text, count, reason


def first_line(text: str) -> int | None:
    """The end of the first line that is not empty, once it is there."""
    start = len(text) - len(text.lstrip("\n"))
    return None if (end := text.find("\n", start)) < 0 else end


class Answers:
    """A file of answers, and the checkpoint that gives those that it does not have.

    Args:
        kind: the benchmark.
        checkpoint: its weights are read when an answer is missing.
        output: JSON lines: what the answers have in common, then each; a killed run goes on with them.
        header: what they have in common, besides the checkpoint's.

    Raises:
        ValueError: the file is of another kind, or of other settings, or a line is no answer.
    """

    def __init__(self, kind: str, checkpoint: Checkpoint, output: Path, header: Record) -> None:
        self.kind, self.checkpoint, self.output = kind, checkpoint, output
        self.model: nn.Module | None = None
        lines = open_records(output, kind, checkpoint.header | header)
        check_results(kind, output, lines, FIELDS)
        self.lines: dict[tuple[str, str], Record] = {(line["task"], line["id"]): line for line in lines}

    def ask(self, prompt: Prompt, limits: Limits) -> Record:
        """The answer to a prompt, from the file or, now, from the model.

        Returns:
            `task`, `id`, `digest` (of the question), `prompt_tokens`, `truncated`, `max_tokens`, `prediction`,
            `generation_tokens`, `finish_reason`, and what the prompt has saved.

        Raises:
            ValueError: the file's answer is to another prompt of the same name.
        """
        name = prompt.task, prompt.id
        if name not in self.lines:
            self.lines[name] = self._answer(prompt, limits)
            append_records(self.output, [self.lines[name]])
        line = self.lines[name]
        if line["digest"] != prompt.digest or line | prompt.saved != line:
            raise ValueError(
                f"[{self.kind}] {self.output} has an answer to another question as {prompt.task}, {prompt.id}: "
                "give the same data or another --output"
            )
        return line

    def _answer(self, prompt: Prompt, limits: Limits) -> Record:
        tokenizer, kv_bits = self.checkpoint.tokenizer, self.checkpoint.header["kv_bits"]
        tokens, truncated = fit(self.kind, tokenizer, prompt, limits)
        self.model = self.model or self.checkpoint.load()
        end = first_line if prompt.one_line else None
        text, count, reason = greedy(self.model, tokenizer, tokens, prompt.budget, end, kv_bits=kv_bits)
        name = {"task": prompt.task, "id": prompt.id, "digest": prompt.digest}
        figures = {"prompt_tokens": len(tokens), "truncated": truncated, "max_tokens": prompt.budget}
        return name | figures | {"prediction": text, "generation_tokens": count, "finish_reason": reason} | prompt.saved


def summarize(
    lines: Sequence[Record],
    score: Callable[[Record], dict[str, float]],
    by: Sequence[str] = ("task", "metric"),
    combine: Callable[[dict[str, float]], float] = lambda scores: fmean(scores.values()),
) -> list[Record]:
    """A row for each task, in percent.

    Args:
        lines: of answers.
        score: what one is worth, by the name of the measure: 0 to 1.
        by: the keys of a line that make a row.
        combine: makes one number of a row's means.

    Returns:
        `by`, `n`, `score`, `scores` where there are several, `max_tokens`, `truncated` (how many were cut).
    """
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for line in lines:
        rows.setdefault(tuple(line[name] for name in by), []).append(line)
    result = []
    for place, some in rows.items():
        values: dict[str, list[float]] = {}
        for line in some:
            for name, value in score(line).items():
                values.setdefault(name, []).append(value)
        means = {name: 100 * fmean(found) for name, found in values.items()}
        row: Record = dict(zip(by, place, strict=True)) | {"n": len(some), "score": round(combine(means), 2)}
        if len(means) > 1:
            row["scores"] = {name: round(mean, 2) for name, mean in means.items()}
        result.append(row | {"max_tokens": some[0]["max_tokens"], "truncated": sum(line["truncated"] for line in some)})
    return result
