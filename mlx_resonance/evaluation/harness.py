"""lm-eval's evaluation of our models as one call that resumes, and what it says: scores, lengths, cuts, settings."""

# lm-eval has no types, and is an extra:
# mypy: disable-error-code="import-untyped,import-not-found"
from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import UsageError, check_option
from ..generation.kv_format import KVBits, KVFormat
from ..run_log import Record
from ..storage import atomic_file, check_output
from ..wired import wired
from .context import describe
from .harness_model import TRUNCATIONS, Progress, ResonanceLM
from .harness_tasks import add_means, complete_metadata, find_tasks, lengths_in
from .responses import Responses

import lm_eval  # isort: skip  # after ours, which say what to install if it is missing
from lm_eval.utils import handle_non_serializable, make_table  # isort: skip

SHOTS = 10_000  # the maximum number of examples in front


@wired()
def run_harness(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    *,
    context: int,
    kv_bits: KVBits = None,
    include_path: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    lengths: Sequence[int] | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    truncation: str = "left",
    chat: bool = False,
    trust_remote_code: bool = False,
    confirm_run_unsafe_code: bool = False,
    output: Path | None = None,
    log_samples: Path | None = None,
    progress: Progress | None = None,
) -> Record:
    """Run lm-eval's tasks.

    Args:
        checkpoint: the model.
        tasks: names of tasks, groups or tags.
        context: maximum number of tokens of a prompt and its answer.
        kv_bits: as in `stream_generate`.
        include_path: a folder with more tasks, as YAML.
        metadata: for tasks that make or read their own data; it gets the lengths and the checkpoint's tokenizer.
        lengths: tokens of prompt and answer, for tasks that come in several.
        num_shots: solved examples in front; None for the task's own number.
        limit: ask only the first documents of each task and length, up to this number.
        max_tokens: of an answer, instead of the task's own budget.
        truncation, progress: as in `ResonanceLM`.
        chat: use the tokenizer's chat template.
        trust_remote_code: let tasks run the code that comes with a tokenizer.
        confirm_run_unsafe_code: run tasks that execute what the model writes.
        output: the file of a run log: each response, then the result. A killed run resumes, more tasks add to it.
        log_samples: file for every document with its prompts, responses and scores, as JSON lines.

    Returns:
        lm-eval's result: `results`, `groups` if there are any, `n-samples`, `config`, `versions`, …; `lengths`, the
        scores by length, if there are several; and what `describe` says.

    Raises:
        UsageError: an argument is out of range, a task is unknown, or the file has responses of other settings.
    """
    check_option("num_shots", num_shots is None or 0 <= num_shots <= SHOTS, f"in [0, {SHOTS}]", num_shots)
    check_option("limit", limit is None or limit >= 1, "at least 1", limit)
    check_option("max_tokens", max_tokens is None or max_tokens >= 1, "at least 1", max_tokens)
    check_option("truncation", truncation in TRUNCATIONS, f"one of {', '.join(TRUNCATIONS)}", repr(truncation))
    if log_samples is not None:
        check_output(log_samples, "log_samples")
        if output is not None and log_samples.absolute() == output.absolute():
            raise UsageError(f"{log_samples} is the file of the run log, too", option="log_samples")
    metadata = complete_metadata(metadata, lengths, tasks, checkpoint, trust_remote_code)
    if (longest := max(lengths_in(metadata), default=0)) > context:
        raise UsageError(f"prompts of {longest} tokens exceed the context of {context} tokens", option="lengths")
    settings = checkpoint.settings(KVFormat.of(kv_bits).value) | {"context": context, "truncation": truncation}
    settings |= {"max_tokens": max_tokens, "num_shots": num_shots, "chat_template": chat}
    responses = Responses(output, settings, about={"model": checkpoint.name})
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what it was asked to do
    options = {"metadata": metadata, "limit": limit, "unsafe": confirm_run_unsafe_code, "chat": chat}
    manager = find_tasks(tasks, include_path, **options)
    with contextlib.redirect_stdout(io.StringIO()):  # some tasks print
        result: Any = lm_eval.simple_evaluate(
            model=ResonanceLM(
                checkpoint, context, kv_bits=kv_bits, truncation=truncation, responses=responses, progress=progress
            ),
            tasks=list(tasks),
            num_fewshot=num_shots,
            samples=None if limit is None else manager.chosen,
            gen_kwargs=None if max_tokens is None else {"max_gen_toks": max_tokens},
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=log_samples is not None,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    samples = result.pop("samples", {})
    # NumPy's numbers become JSON's, and NaN and infinity null.
    plain: Record = json.loads(json.dumps(result, default=handle_non_serializable), parse_constant=lambda _: None)
    add_means(plain)
    plain["config"]["limit"] = limit
    plain |= describe(checkpoint, kv_bits, context=context, truncation=truncation, chat_template=chat)
    if log_samples is not None:
        write_samples(samples, log_samples)
    responses.add_result(tasks, plain)
    return plain


def write_samples(samples: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Write lm-eval's samples as JSON lines, each with the name of its task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for task, some in samples.items():
            for sample in some:
                file.write(json.dumps({"task": task} | sample, default=handle_non_serializable) + "\n")


def tables(result: Record) -> str:
    """A result to paste: lm-eval's own tables, the scores by length, and what they were measured with."""
    parts = [make_table(result, part) for part in ("results", "groups") if result.get(part)]
    if by_length := result.get("lengths"):
        names = [*dict.fromkeys(name for scores in by_length.values() for name in scores if name != "mean"), "mean"]
        rows = [["Tokens", *by_length], ["---", *["---:"] * len(by_length)]]
        for name in names:
            scores = (of.get(name) for of in by_length.values())
            rows.append([name, *("" if score is None else f"{score:.4f}" for score in scores)])
        parts.append("".join("|" + "|".join(row) + "|\n" for row in rows))
    config, versions, rope = result["config"], result["version"], result["rope"]["rope_scaling"] or {}
    asked, cut = config["requests"], config["truncated"]
    scaled = "".join(f", {key} {rope[key]}" for key in ("factor", "original_max_position_embeddings") if key in rope)
    return "\n".join(parts) + "\n".join((
        "",
        f"model {result['model']}, digest {result['digest']}, KV bits {result['kv_bits'] or 'none'}",
        f"rope {rope.get('rope_type', 'default')}{scaled}, base {result['rope']['rope_theta']:g}",
        f"context {result['context']}, {cut} of {asked} prompts cut {TRUNCATIONS[result['truncation']]} "
        f"({result['truncation']}), {'with' if result['chat_template'] else 'no'} chat template, "
        f"mlx-resonance {versions['mlx-resonance']}, lm-eval {versions['lm-eval']}",
    ))  # fmt: skip
