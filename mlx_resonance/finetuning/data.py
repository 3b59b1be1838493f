"""Documents and chats as training data: read, tokenized, packed into sequences of one length, dealt to steps.

Sequences are arrays of token ids, in which a token that the loss does not count is stored as ~id, a negative number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import ANOTHER, MissingFileError, UsageError
from ..evaluation.texts import LINES, check_files, data_digest, read_documents
from ..files import user_path
from ..run_log import check_field, json_lines
from ..storage import atomic_file, check_input
from .chat import Chat, Ids, chat_of, encode, pair_of
from .positions import skipped_positions

TRAIN, VALID = "train.jsonl", "valid.jsonl"
TEXT = "text"
LEFT_OVER = 0.1  # a part of all tokens; dropping more than that at the end is worth a warning
# The kinds of rows in JSON lines: the keys that tell one, in mlx-lm's order, and what reads it, given its place.
KINDS: Mapping[str, tuple[set[str], Callable[[str, Any], Any]]] = {
    "prompts": ({"prompt", "completion"}, pair_of),
    "chats": ({"messages"}, chat_of),
    TEXT: ({TEXT}, lambda where, row: check_field(where, row, TEXT, str, "data")),
}

logger = logging.getLogger("mlx_resonance")


def data_files(path: str | Path) -> tuple[list[Path], list[Path]]:
    """The files to train on, and the held-out ones.

    Args:
        path: a folder with `train.jsonl` and perhaps `valid.jsonl`, as in mlx-lm, or with texts (`*.txt`); or one file:
            JSON lines (`.jsonl`), a parquet table or text.

    Raises:
        MissingFileError: there is no such path, or no such file in the folder.
        UsageError: it is a pipe, a device or a socket, or a file is not one for `check_files`.
    """
    path = user_path(path)
    if path.is_file():
        check_files([path])
        return [path], []
    if not path.is_dir():
        check_input(path, "data")
        raise MissingFileError(f"{path}: no such folder or file", option="data")
    files = [path / TRAIN] if (path / TRAIN).is_file() else sorted(path.glob("*.txt"))
    if not files:
        raise MissingFileError(f"{path} has neither {TRAIN} nor *.txt", option="data")
    held_out = [path / VALID] if (path / VALID).is_file() else []
    check_files([*files, *held_out])
    return files, held_out


def rows_of(path: Path) -> list[str] | list[Chat]:
    """What a file has to train on: the documents of a text or a table, the documents or chats of JSON lines.

    Raises:
        UsageError: it has none, or a row is broken or of another kind than the first one; its line is named.
    """
    rows = _json_rows(path) if path.suffix.lower() in LINES else list(read_documents([path], "text"))
    kept = [row for row in rows if not isinstance(row, str) or row.strip()]
    if not kept:
        raise UsageError(f"{path} is empty: expected " + '{"text": …} lines or text', option="data")
    if len(kept) < len(rows):
        logger.warning(f"{path}: {len(rows) - len(kept)} of {len(rows)} documents are empty and left out")
    return kept


def _json_rows(path: Path) -> list[Any]:
    rows: list[Any] = []
    first: tuple[int, str] | None = None
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(entry, dict):
            raise UsageError(f"{where} is not a JSON object", option="data")
        kind = next((kind for kind, (keys, _) in KINDS.items() if keys <= entry.keys()), first[1] if first else None)
        if kind is None:
            kinds = ", or ".join(" and ".join(sorted(keys)) for keys, _ in KINDS.values())
            raise UsageError(f"{where} has no {kinds}", option="data")
        first = first or (number, kind)
        if kind != first[1]:
            raise UsageError(f"{where} is a row of {kind}, line {first[0]} is one of {first[1]}", option="data")
        rows.append(KINDS[kind][1](where, entry))
    return rows


def packed(
    files: list[Path], tokenizer: TokenizerWrapper, length: int, seed: int, mask_prompt: bool | None = None
) -> Ids:
    """All documents or chats of some files, shuffled and packed into sequences.

    Args:
        files: of JSON lines or text.
        tokenizer: of the checkpoint.
        length: tokens of a sequence.
        seed: of the order.
        mask_prompt: of chats, count only the assistant's turns; None for yes. Documents have no such turns.

    Returns:
        Shape (sequences, length), ~id for tokens that the loss does not count.

    Raises:
        UsageError: a file cannot be read, the tokens do not fill a sequence, no chat can be trained on, or the
            tokenizer has no end token (documents) or no chat template (chats).
    """
    rows: list[Any] = [row for file in files for row in rows_of(file)]
    order = np.random.default_rng(seed).permutation(len(rows))
    if isinstance(rows[0], Chat):
        if not tokenizer.has_chat_template:
            raise UsageError("the tokenizer has no chat template: chats need one", option="model")
        chats = [encode(tokenizer, row, mask_prompt is not False) for row in rows]  # an error names the first bad line
        return _side_by_side(_beginnings([chats[i] for i in order], length, files[0]), length, files[0])
    if mask_prompt:
        raise UsageError(f"{files[0]} has documents, not chats: there is no prompt to mask", option="mask_prompt")
    return _end_to_end([rows[i] for i in order], tokenizer, length, files[0])


class Dated:
    """Sequences of a chat template that writes today's date: a run that is resumed another day needs those it had.

    Args:
        folder: where the run is made.
        source: the checkpoint, whose tokenizer makes them.
        files, packing: what the sequences are made of, and how.
    """

    def __init__(self, folder: Path, source: Checkpoint, files: list[Path], packing: Sequence[Any]) -> None:
        self.path, self.kept = folder / "sequences.npz", False
        self.dated = "strftime_now" in str(getattr(source.tokenizer, "chat_template", None))
        self.made_of = json.dumps([source.digest, data_digest(files, TEXT), *packing]) if self.dated else ""

    def as_begun(self, sequences: Ids, held_out: Ids | None) -> tuple[Ids, Ids | None]:
        """Those that an earlier run has kept, if they are made of the same files; otherwise these."""
        if not self.dated or not self.path.is_file():
            return sequences, held_out
        with np.load(self.path, allow_pickle=False) as found:
            self.kept = str(found["made_of"]) == self.made_of
            if not self.kept:
                return sequences, held_out
            return found["sequences"], found["held_out"] if held_out is not None else None

    def keep(self, sequences: Ids, held_out: Ids | None) -> None:
        """Keep them for a resumed run."""
        if self.dated and not self.kept:
            arrays = {"sequences": sequences, "held_out": np.zeros(0) if held_out is None else held_out}
            with atomic_file(self.path) as partial, partial.open("wb") as file:
                np.savez(file, made_of=np.array(self.made_of), **arrays)  # type: ignore[arg-type]


def _end_to_end(documents: list[str], tokenizer: TokenizerWrapper, length: int, name: Path) -> Ids:
    """Documents, each with its start and end token, joined and cut; the tokens left over at the end are dropped."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise UsageError("the tokenizer has no end-of-text token: expected eos_token in its config", option="model")
    pieces = []
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        pieces.append(np.array([*([] if start is None else [start]), *ids, end], dtype=np.int32))
    stream = np.concatenate(pieces)
    count = len(stream) // length
    if count == 0:
        raise UsageError(
            f"{name} has {len(stream)} tokens, a sequence needs {length}",
            remedies=[{"data": ANOTHER}, {"length": None}],
        )
    if (left := len(stream) - count * length) > LEFT_OVER * len(stream):
        logger.warning(
            f"{name}: {left:,} of {len(stream):,} tokens do not fill another sequence of {length} and are left out",
            extra={"remedies": [{"length": None}]},
        )
    return stream[: count * length].reshape(count, length)


def _beginnings(chats: list[Ids], length: int, name: Path) -> list[Ids]:
    """Chats cut to `length`, without those of which nothing would be trained then: a warning tells of both."""
    whole = [chat[:length] for chat in chats]
    kept = [chat for chat in whole if (chat[1:] >= 0).any()]
    if not kept:
        raise UsageError(
            f"{name}: no chat has an answer within its first {length} tokens",
            remedies=[{"data": ANOTHER}, {"length": None}],
        )
    if long := sum(len(chat) > length for chat in chats):
        without = f"; left out, since their answers come later: {len(whole) - len(kept)}"
        logger.warning(
            f"{name}: {long} of {len(chats)} chats exceed {length} tokens: only their beginnings are trained on"
            + (without if len(kept) < len(whole) else ""),
            extra={"remedies": [{"length": None}]},
        )
    return kept


def _side_by_side(chats: list[Ids], length: int, name: Path) -> Ids:
    """Whole chats, each in the first sequence with room for it; the rest of a sequence is padding that nobody sees."""
    taken, spans = np.zeros(len(chats), dtype=np.int64), []
    count = 0
    for chat in chats:
        place = int(np.argmax(taken[: count + 1] + len(chat) <= length))
        count = max(count, place + 1)
        spans.append((place, slice(taken[place], taken[place] + len(chat))))
        taken[place] += len(chat)
    sequences = np.full((count, length), ~0, dtype=np.int32)
    for span, chat in zip(spans, chats, strict=True):
        sequences[span] = chat
    padding = 1 - taken.sum() / sequences.size
    if padding > 0.5:
        logger.warning(
            f"{name}: the chats do not fill sequences of {length} tokens, {padding:.0%} is padding",
            extra={"remedies": [{"length": None}]},
        )
    return sequences


def token_ids(sequences: Ids) -> Ids:
    """The ids of all tokens, counted by the loss or not."""
    return np.where(sequences < 0, ~sequences, sequences)


def token_weights(sequences: Ids) -> NDArray[np.float32]:
    """What each token counts as a target in the mean over all targets of these sequences.

    It is 0 or the same for all, and 1 on average: however the sequences are split into equal parts, the mean of the
    parts' means is the mean over the tokens that count.
    """
    trained = sequences >= 0
    targets = trained[:, 1:]
    return (trained * (targets.size / max(1, targets.sum()))).astype(np.float32)


class Batches:
    """The sequences of a step, a function of the step's number alone: every pass has its own order.

    Args:
        sequences: shape (sequences, length), ~id for tokens that the loss does not count.
        size: sequences of a step.
        seed: of the orders, and of the skipped positions.
        context: tokens of context that the positions of the sequences cover, with skips; None for no skips.
    """

    def __init__(self, sequences: Ids, size: int, seed: int, context: int | None = None) -> None:
        self.sequences, self.size, self.seed, self.context = sequences, size, seed, context
        self.weighted = bool((sequences < 0).any()) or context is not None

    def __call__(self, step: int) -> tuple[mx.array, ...]:
        """Token ids, shape (size, length); then, where not all count alike, weights; then, with skips, positions."""
        numbers = np.arange(step * self.size, (step + 1) * self.size)
        passes, places = np.divmod(numbers, len(self.sequences))
        orders = {n: np.random.default_rng((self.seed, n)).permutation(len(self.sequences)) for n in set(passes)}
        rows = self.sequences[[orders[n][place] for n, place in zip(passes, places, strict=True)]]
        arrays: list[NDArray[Any]] = [token_ids(rows)]
        if self.weighted:
            arrays.append(token_weights(rows))
        if self.context is not None:
            arrays.append(skipped_positions(numbers, rows.shape[1], self.context, self.seed))
        return tuple(map(mx.array, arrays))
