"""A checkpoint's embedding and the head that config.json may tie to it: which of the two the files have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx

EMBEDDING, HEAD = "model.embed_tokens.", "lm_head."
WEIGHT = "weight"
Entry = TypeVar("Entry")
Reader = Callable[[str], mx.array]  # of a tensor by its name

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class TiedHead:
    """What became of a tied head.

    Args:
        tied: `tie_word_embeddings` of the model to build.
        left_out: tensors of the files that the model does not have, and why nothing is lost without them.
        renamed: tensors that the model has under another name, by their name in the files.
    """

    tied: bool
    left_out: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def apply(self, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
        """Tensors by their names in the model."""
        return {self.renamed.get(name, name): value for name, value in tensors.items() if name not in self.left_out}


def resolve_head(tied: bool | None, tensors: Collection[str], read: Reader | None = None) -> TiedHead:
    """Decide about the head. transformers unties one that differs from the embedding; so does this, with a warning.

    Args:
        tied: `tie_word_embeddings` of config.json; None for what the names say.
        tensors: their names.
        read: a tensor by its name; None where they cannot be read, which takes config.json's word for it.
    """
    heads = {name: EMBEDDING + name.removeprefix(HEAD) for name in tensors if name.startswith(HEAD)}
    if HEAD + WEIGHT not in heads:
        return TiedHead(tied is None or tied)
    if not tied:
        return TiedHead(False)
    if EMBEDDING + WEIGHT not in tensors:
        logger.warning(
            f"{EMBEDDING}{WEIGHT} is not in the weights: {HEAD}{WEIGHT}, to which config.json ties it, is both"
        )
        return TiedHead(True, renamed=heads)
    embeddings = {name for name in tensors if name.startswith(EMBEDDING)}
    same = embeddings == set(heads.values())
    if same and read is not None:
        same = all(_equal(read(head), read(embedding)) for head, embedding in heads.items())
    if not same:
        logger.warning(
            f"{HEAD}{WEIGHT} differs from {EMBEDDING}{WEIGHT}, to which config.json ties it: both are used, untied"
        )
        return TiedHead(False)
    equal = "equal to" if read is not None else "not yet compared with"
    return TiedHead(True, {name: f"{equal} {embedding}, to which it is tied" for name, embedding in heads.items()})


def _equal(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one, other, equal_nan=True).item())
