"""Many prompts at once: mlx-lm's continuous batching, with one line of a run log per answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import MissingFileError, UsageError
from ..run_log import Record, RunLog, json_lines
from ..tokenizer import check_ids
from .prefill import PREFILL_BATCH, STEP
from .prompt_cache import refuse_changing_angles
from .stream import check_length, check_options, prompt_tokens

BATCH = 32  # answers generated at once
KIND = "generate"  # of the run log


@dataclass(frozen=True)
class Request:
    """A prompt with an id.

    Args:
        id: identifies the prompt and its answer.
        tokens: the prompt's token ids.
        prompt: its text.
    """

    id: str | int
    tokens: list[int]
    prompt: str

    @property
    def identity(self) -> Record:
        """What tells this prompt from another with the same id: its beginning and its digest."""
        digest = hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return {"prompt": self.prompt[:60], "prompt_digest": digest}


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
    """Answer many prompts; a finished answer makes room for the next prompt.

    Args:
        model, tokenizer: from `load`.
        requests: the prompts.
        max_tokens, temp, top_p, seed, prefill_step_size: as in `stream_generate`. With temp above 0 an answer depends
            on its neighbours in the batch.
        batch_size: maximum number of answers at once.

    Returns:
        For each request, in the order in which they finish: `id`, `text`, `prompt_tokens`, `generation_tokens`,
        `finish_reason`.

    Raises:
        UsageError: a prompt has an id outside the vocabulary, a prompt and its answer exceed the context, or the angles
            change with the length of a text.
    """
    check_options(max_tokens, temp, top_p, seed, prefill_step_size, batch_size=batch_size)
    refuse_changing_angles(model.args.rope, "a batch has texts of several lengths")
    for request in requests:
        check_ids(tokenizer, request.tokens, model.args.vocab_size)
        check_length(model.args.rope, len(request.tokens), max_tokens)
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
                        "text": text_of(tokenizer, tokens),
                        "prompt_tokens": len(of[response.uid].tokens),
                        "generation_tokens": len(tokens),
                        "finish_reason": response.finish_reason,
                    }
    finally:
        generator.close()


def text_of(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The text of an answer, decoded as in `stream_generate`."""
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text)


def open_answers(
    output: Path, requests: Sequence[Request], settings: Record, model: str
) -> tuple[RunLog, set[str | int]]:
    """Open the run log of a batch. Returns it with the ids that it has answers for.

    Args:
        output: a file of JSON lines, created if it does not exist.
        requests: the prompts.
        settings: what the answers depend on besides the prompts: the checkpoint's settings and the sampling's.
        model: name of the checkpoint, for the header.

    Raises:
        UsageError: the file has answers with other settings, or to another prompt with the same id.
    """
    fields = {"prompt": str, "prompt_digest": str, "text": str}
    log = RunLog(output, KIND, settings, about={"model": model}, key=("id",), fields=fields)
    return log, {request.id for request in requests if log.find(request.id, **request.identity) is not None}


def answer_requests(
    log: RunLog,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    requests: Sequence[Request],
    on_answer: Callable[[], None] | None = None,
    **options: Any,
) -> None:
    """Answer the requests, and append each answer to a run log as soon as it is finished.

    Args:
        log: from `open_answers`.
        model, tokenizer, requests, options: as in `generate_batch`.
        on_answer: called after each answer.
    """
    identities = {request.id: request.identity for request in requests}
    for answer in generate_batch(model, tokenizer, requests, **options) if requests else ():
        log.reload()  # another process may be answering the same prompts
        if (answer["id"],) not in log:
            log.append({"id": answer["id"]} | identities[answer["id"]] | answer)
        if on_answer is not None:
            on_answer()


def read_requests(path: Path, tokenizer: TokenizerWrapper, chat: bool = False) -> list[Request]:
    """Read a file of JSON lines, each with a unique `id` (a string or an integer) and a `prompt`.

    Raises:
        MissingFileError: there is no such file.
        UsageError: a line is something else.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of prompts", option="prompts_file")
    requests: list[Request] = []
    seen: set[str | int] = set()
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        known = isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
        if not known or not isinstance(entry.get("id"), (str, int)) or isinstance(entry["id"], bool):
            raise UsageError(f'{where}: expected {{"id": …, "prompt": "…"}}', option="prompts_file")
        if entry["id"] in seen:
            raise UsageError(f"{where}: the id {entry['id']!r} is given twice", option="prompts_file")
        seen.add(entry["id"])
        try:
            tokens = prompt_tokens(tokenizer, entry["prompt"], chat)
        except UsageError as error:
            raise UsageError(f"{where}: {error.message}", option="prompts_file", remedies=error.remedies) from None
        requests.append(Request(entry["id"], tokens, entry["prompt"]))
    if not requests:
        raise UsageError(f"{path} has no prompts", option="prompts_file")
    return requests
