"""Documents as training data: read, tokenized, packed into sequences of one length, dealt to steps."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ANOTHER, MissingFileError, UsageError
from ..evaluation.texts import read_documents
from ..files import user_path
from ..storage import check_input

TRAIN, VALID = "train.jsonl", "valid.jsonl"


def data_files(path: str | Path) -> tuple[list[Path], list[Path]]:
    """The files to train on, and the held-out ones.

    Args:
        path: a folder with `train.jsonl` and perhaps `valid.jsonl`, as in mlx-lm, or with texts (`*.txt`); or one file:
            JSON lines (`.jsonl`), a parquet table or text.

    Raises:
        MissingFileError: there is no such path, or no such file in the folder.
        UsageError: it is empty, or a pipe, a device or a socket.
    """
    path = user_path(path)
    if path.is_file():
        return [path], []
    if not path.is_dir():
        check_input(path, "data")
        raise MissingFileError(f"{path}: no such folder or file", option="data")
    files = [path / TRAIN] if (path / TRAIN).is_file() else sorted(path.glob("*.txt"))
    if not files:
        raise MissingFileError(f"{path} has neither {TRAIN} nor *.txt", option="data")
    return files, [path / VALID] if (path / VALID).is_file() else []


def documents_of(path: Path) -> list[str]:
    """The documents of a file: the `text` of each line or row, or a plain text. Raises UsageError where it has none."""
    documents = [document for document in read_documents([path], "text") if document.strip()]
    if not documents:
        raise UsageError(f"{path} is empty: expected " + '{"text": …} lines or text', option="data")
    return documents


def packed(files: list[Path], tokenizer: TokenizerWrapper, length: int, seed: int) -> np.ndarray:
    """All documents, shuffled, joined and cut into sequences; each document has its start and end token.

    Args:
        files: of JSON lines or text.
        tokenizer: of the checkpoint. If it has no start token, documents get none.
        length: tokens of a sequence.
        seed: of the documents' order.

    Returns:
        int32, shape (sequences, length); the tokens left over at the end are dropped.

    Raises:
        UsageError: a file cannot be read, the tokens do not fill a sequence, or the tokenizer has no end token.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise UsageError("the tokenizer has no end-of-text token: expected eos_token in its config", option="model")
    documents = [document for file in files for document in documents_of(file)]
    order = np.random.default_rng(seed).permutation(len(documents))
    pieces = []
    for i in order:
        ids = tokenizer.encode(documents[i], add_special_tokens=False)
        pieces.append(np.array([*([] if start is None else [start]), *ids, end], dtype=np.int32))
    stream = np.concatenate(pieces)
    count = len(stream) // length
    if count == 0:
        raise UsageError(
            f"{files[0]} has {len(stream)} tokens, a sequence needs {length}",
            remedies=[{"data": ANOTHER}, {"length": None}],
        )
    return stream[: count * length].reshape(count, length)


class Batches:
    """The sequences of a step, a function of the step's number alone: every pass has its own order.

    Args:
        sequences: int32, shape (sequences, length).
        size: sequences of a step.
        seed: of the orders.
    """

    def __init__(self, sequences: np.ndarray, size: int, seed: int) -> None:
        self.sequences, self.size, self.seed = sequences, size, seed

    def __call__(self, step: int) -> tuple[mx.array]:
        """Token ids, int32, shape (size, length)."""
        numbers = np.arange(step * self.size, (step + 1) * self.size)
        passes, places = np.divmod(numbers, len(self.sequences))
        orders = {n: np.random.default_rng((self.seed, n)).permutation(len(self.sequences)) for n in set(passes)}
        rows = [orders[n][place] for n, place in zip(passes, places, strict=True)]
        return (mx.array(self.sequences[rows]),)
