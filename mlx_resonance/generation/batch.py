"""Many prompts at once: mlx-lm's continuous batching, with one line of a run log per answer."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .._mlx_lm import generation_stream
from ..errors import MissingFileError, UsageError
from ..rope_config import RopeConfig
from ..run_log import Record, RunLog, json_lines
from ..wired import wired
from .beginnings import SHARED, by_beginning
from .engine import Engine
from .kv_format import KVBits
from .messages import prompt_tokens
from .prefill import STEP
from .prompt_cache import PromptCache, refuse_changing_angles
from .rows import Batch
from .sampling import Sampling
from .stop import StopStrings
from .stream import check_options

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
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    kv_bits: KVBits = None,
    kv_rotate: bool = False,
    disk_cache: PromptCache | None = None,
    batch_size: int = BATCH,
    prefill_step_size: int = STEP,
    agree: Callable[[int], int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer many prompts; a finished answer makes room for the next prompt.

    A long beginning that prompts share is read once: prompts with the same one follow each other, and its KV cache is
    kept, besides those of the batch, until the last of them has been copied from it.

    Args:
        model, tokenizer: from `load`.
        requests: the prompts.
        max_tokens, temp, top_p, seed, stop, kv_bits, kv_rotate, prefill_step_size: as in `stream_generate`. With temp
            above 0 an answer depends on its neighbours in the batch.
        sampling: instead of temp, top_p and seed.
        disk_cache: on-disk KV cache, for beginnings that prompts share and for prompts on their own.
        batch_size: maximum number of answers at once.
        agree: for several processes, as of `Pace`.

    Returns:
        For each request, in the order in which they finish: `id`, `text`, `prompt_tokens`, `generation_tokens`,
        `finish_reason`.

    Raises:
        UsageError: an option is out of range, a prompt has an id outside the vocabulary, a prompt and its answer exceed
            the context, or `refuse_rope`.
        DeviceError: the GPU did not carry out a chunk.
    """
    check_options(max_tokens, temp, top_p, seed, prefill_step_size, batch_size=batch_size)
    refuse_rope(model.args.rope)
    sampling = sampling or Sampling(temp=temp, top_p=top_p, seed=seed)
    sampling.check(model.args.vocab_size)
    StopStrings(stop)
    options: dict[str, Any] = {"kv_bits": kv_bits, "kv_rotate": kv_rotate, "disk_cache": disk_cache, "agree": agree}
    engine = Engine(model, tokenizer, prefill_step_size=prefill_step_size, **options)
    for request in requests:
        engine.check(request.tokens, max_tokens)
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    waiting = deque(by_beginning([request.tokens for request in requests], SHARED))
    with wired(generation_stream, model=model):
        batch = Batch(engine, sampling, stop, max_tokens, batch_size)
        try:
            while waiting or batch.rows:
                while waiting and batch.has_room():
                    index, shared = waiting.popleft()
                    batch.insert(requests[index], shared, last=not waiting)
                yield from batch.step()
        finally:
            batch.generator.close()


def refuse_rope(rope: RopeConfig) -> None:
    """Raise UsageError if the rows of a batch could not rotate alike: with a position map, or by their lengths."""
    refuse_changing_angles(rope, "a batch has texts of several lengths")
    if rope.positions is not None:
        raise UsageError(f"{rope.positions.extend} is for one text at a time", option="extend")


def sequences(prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """How many sequences a batch holds at once: its rows, and a beginning that they share."""
    shares = any(shared for _, shared in by_beginning([list(prompt) for prompt in prompts], SHARED))
    return max(1, min(batch_size, len(prompts))) + shares


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
