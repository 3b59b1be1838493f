"""Greedy answers to prompts, one after another, each saved as soon as it ends.

Prompts are not batched: a long one keeps a GPU busy by itself, a second one needs its memory again, and an answer would
depend, in its last bits, on its neighbours in the batch, so that a resumed run would end differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint import Checkpoint
from ..generation import stream_generate
from ..generation.kv_format import KVBits, KVFormat
from ..generation.text import text_of
from ..run_log import Record, RunLog
from .prompts import Limits, Prompt, fit

FIELDS = {"task": str, "id": str, "metric": str, "digest": str, "prediction": str, "max_tokens": int, "truncated": bool}


def greedy(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    max_tokens: int,
    end: Callable[[str], int | None] | None = None,
    **options: Any,
) -> tuple[str, int, str]:
    """Generate the likeliest token, one after another.

    `end` is given the text so far, and returns where the answer ends; None if it does not end yet.

    Returns:
        text, its number of tokens, "stop" or "length".
    """
    written, text, count, reason = list[int](), "", 0, "length"
    options["prompt_lookup"] = "off"  # rounding must not depend on measured times
    stream: Any = stream_generate(model, tokenizer, tokens, max_tokens=max_tokens, **options)
    with closing(stream):
        for response in stream:
            count, reason = response.generation_tokens, response.finish_reason
            if reason != "stop":
                written.append(response.token)
            if end is not None or reason is not None:
                text = text_of(tokenizer, written)
            if end is not None and (stop := end(text)) is not None:
                return text[:stop], count, "stop"
    return text, count, reason


class Answers:
    """The answers of a checkpoint to the prompts of a benchmark, in a run log.

    Args:
        kind: the benchmark.
        checkpoint: its weights are read when the first answer is missing.
        output: the file of the run log, keyed by task and id.
        settings: what all answers have in common, besides the checkpoint's settings.
        kv_bits: as in `stream_generate`.

    Raises:
        UsageError: the file is of another kind, or of other settings, or a line is not an answer.
    """

    def __init__(
        self, kind: str, checkpoint: Checkpoint, output: Path, settings: Record, kv_bits: KVBits = None
    ) -> None:
        self.checkpoint, self.kv_bits = checkpoint, kv_bits
        self.model: nn.Module | None = None
        settings, about = checkpoint.settings(KVFormat.of(kv_bits).value) | settings, {"model": checkpoint.name}
        self.log = RunLog(output, kind, settings, about=about, key=("task", "id"), fields=FIELDS)

    def ask(self, prompt: Prompt, limits: Limits) -> Record:
        """The answer to a prompt, from the log or, if it has none, from the model.

        Returns:
            `task`, `id`, `digest` (of the question), `prompt_tokens`, `truncated`, `max_tokens`, `prediction`,
            `generation_tokens`, `finish_reason`, and the prompt's `saved`.

        Raises:
            UsageError: the log's answer is to another question of this task and id.
        """
        line = self.log.find(prompt.task, prompt.id, **prompt.saved, digest=prompt.digest)
        if line is None:
            line = self._answer(prompt, limits)
            self.log.append(line)
        return line

    def _answer(self, prompt: Prompt, limits: Limits) -> Record:
        tokenizer = self.checkpoint.tokenizer
        tokens, truncated = fit(tokenizer, prompt, limits)
        self.model = self.model or self.checkpoint.load()
        text, count, reason = greedy(self.model, tokenizer, tokens, prompt.budget, kv_bits=self.kv_bits)
        name = {"task": prompt.task, "id": prompt.id, "digest": prompt.digest}
        figures = {"prompt_tokens": len(tokens), "truncated": truncated, "max_tokens": prompt.budget}
        return name | figures | {"prediction": text, "generation_tokens": count, "finish_reason": reason} | prompt.saved


def summarize(
    lines: Sequence[Record],
    score: Callable[[Record], dict[str, float]],
    by: Sequence[str] = ("task", "metric"),
    combine: Callable[[dict[str, float]], float] = lambda scores: fmean(scores.values()),
) -> list[Record]:
    """The mean scores of answers, in percent, a row for each task.

    Args:
        lines: the answers.
        score: the scores of an answer, 0 to 1, by the name of the measure.
        by: the fields of an answer that tell its row.
        combine: makes one number of the means of a row.

    Returns:
        `by`, `n`, `score`, `scores` where there are several, `max_tokens`, `truncated` (number of cut prompts).
    """
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for line in lines:
        rows.setdefault(tuple(line[name] for name in by), []).append(line)
    result = []
    for place, some in rows.items():
        scores = [score(line) for line in some]
        names = dict.fromkeys(chain.from_iterable(scores))
        means = {name: 100 * fmean(found[name] for found in scores if name in found) for name in names}
        row: Record = dict(zip(by, place, strict=True)) | {"n": len(some), "score": round(combine(means), 2)}
        if len(means) > 1:
            row["scores"] = {name: round(mean, 2) for name, mean in means.items()}
        result.append(row | {"max_tokens": some[0]["max_tokens"], "truncated": sum(line["truncated"] for line in some)})
    return result
