"""Many prompts at once: mlx-lm's continuous batching, a line of JSON for each answer, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..records import json_lines
from .prefill import PREFILL_BATCH, STEP
from .stream import check_context, prompt_tokens

BATCH = 32  # answers that are written at once


@dataclass(frozen=True)
class Request:
    """A prompt with a name.

    Args:
        id: that its answer will have.
        tokens: of the prompt.
    """

    id: str | int
    tokens: list[int]


def generate_batch(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    requests: Sequence[Request],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = BATCH,
    prefill_step_size: int = STEP,
) -> Iterator[dict[str, Any]]:
    """Answer many prompts; an answer that ends makes room for the next prompt.

    Args:
        model, tokenizer: from `load`.
        requests: the prompts.
        max_tokens, temp, top_p, seed, prefill_step_size: as in `stream_generate`. With temp above 0 an answer depends
            on its neighbours in the batch.
        batch_size: most answers at once.

    Returns:
        For each request, in the order in which they end: `id`, `text`, `prompt_tokens`, `generation_tokens`,
        `finish_reason`.

    Raises:
        ValueError: a prompt and its answer exceed the context, or the angles change with the length of a text.
    """
    if model.args.rope.depends_on_length:
        raise ValueError(
            f"[generate] batch: the angles of {model.args.rope.rope_type} change with the length of a text"
        )
    for request in requests:
        check_context(model.args.rope, len(request.tokens), max_tokens)
    if seed is not None:
        mx.random.seed(seed)
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=make_sampler(temp=temp, top_p=top_p if top_p < 1 else 0.0),
        completion_batch_size=batch_size,
        prefill_batch_size=min(PREFILL_BATCH, batch_size),
        prefill_step_size=prefill_step_size,
    )
    try:
        ids = generator.insert([request.tokens for request in requests], [max_tokens] * len(requests))
        of = dict(zip(ids, requests, strict=True))
        written: dict[int, list[int]] = {uid: [] for uid in ids}
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    written[response.uid].append(response.token)
                if response.finish_reason is not None:
                    tokens = written.pop(response.uid)
                    yield {
                        "id": of[response.uid].id,
                        "text": tokenizer.decode(tokens),
                        "prompt_tokens": len(of[response.uid].tokens),
                        "generation_tokens": len(tokens),
                        "finish_reason": response.finish_reason,
                    }
    finally:
        generator.close()


def answer_file(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    requests: Sequence[Request],
    output: Path,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Answer the requests whose ids `output` does not have yet, and append a line of JSON for each.

    Args:
        model, tokenizer, requests: as in `generate_batch`.
        output: a file of JSON lines; what a killed run left of a line is dropped.
        progress: called with the number of answers done and in all.
        options: of `generate_batch`.

    Returns:
        How many were answered now.

    Raises:
        ValueError: `output` holds something else; or as `generate_batch`.
    """
    done = finished_ids(output)
    missing = [request for request in requests if request.id not in done]
    count = 0
    if progress is not None:
        progress(len(requests) - len(missing), len(requests))
    with output.open("a", encoding="utf-8") as file:
        for answer in generate_batch(model, tokenizer, missing, **options) if missing else ():
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
            if progress is not None:
                progress(len(requests) - len(missing) + count, len(requests))
    return count


def finished_ids(output: Path) -> set[str | int]:
    """The ids that a file of answers has. Raises ValueError for another file; cuts off half a line at its end."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    ids: set[str | int] = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            answer = json.loads(line)
            name, _ = answer["id"], answer["text"]
            ids.add(name)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"[generate] {output}, line {number} is no answer: choose another --output") from None
    if len(whole) < len(content):
        if not b'{"id": '.startswith(content[len(whole) :][:7]):
            raise ValueError(f"[generate] {output}, its last line is no answer: choose another --output")
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return ids


def read_requests(path: Path, tokenizer: TokenizerWrapper, chat: bool = False) -> list[Request]:
    """A file of JSON lines, each with `id` (a string or an integer, once) and `prompt`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[generate] no prompts file {path}")
    requests: list[Request] = []
    seen: set[str | int] = set()
    for number, entry in json_lines("generate", path):
        where = f"[generate] {path}, line {number}"
        known = isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
        if not known or not isinstance(entry.get("id"), (str, int)) or isinstance(entry["id"], bool):
            raise ValueError(f'{where}: expected {{"id": …, "prompt": "…"}}')
        if entry["id"] in seen:
            raise ValueError(f"{where}: the id {entry['id']!r} stands twice")
        seen.add(entry["id"])
        try:
            requests.append(Request(entry["id"], prompt_tokens(tokenizer, entry["prompt"], chat)))
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('[generate] ')}") from None
    if not requests:
        raise ValueError(f"[generate] {path} has no prompts")
    return requests
