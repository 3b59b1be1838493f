"""A checkpoint's embedding and the head that config.json may tie to it: which of the two the files have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = ("weight", "scales", "biases")  # of a tensor that mlx-lm may have quantized
Entry = TypeVar("Entry")
Same = Callable[[str, str], bool]  # whether two tensors of the files, given by name, are equal

logger = logging.getLogger("mlx_resonance")


@dataclass(frozen=True)
class TiedHead:
    """What became of a tied head.

    Args:
        tied: `tie_word_embeddings` of the model to build.
        left_out: tensors of the head that the model does not have, each with the one of the embedding that equals it.
        renamed: tensors that the model has under another name, by their name in the files.
        compared: whether those that are left out have been compared.
    """

    tied: bool
    left_out: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    compared: bool = True

    def apply(self, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
        """Tensors by their names in the model."""
        return {self.renamed.get(name, name): value for name, value in tensors.items() if name not in self.left_out}

    def reasons(self) -> dict[str, str]:
        """Why nothing is lost without those that are left out."""
        equal = "equal to" if self.compared else "not yet compared with"
        return {name: f"{equal} {embedding}, to which it is tied" for name, embedding in self.left_out.items()}


def resolve_head(tied: bool | None, tensors: Collection[str], same: Same | None = None) -> TiedHead:
    """Decide about the head. transformers unties one that differs from the embedding; so does this, with a warning.

    Args:
        tied: `tie_word_embeddings` of config.json; None for what the names say.
        tensors: their names.
        same: compares two; None where they cannot be read yet, which takes config.json's word for it.
    """
    heads = {HEAD.replace("weight", part): EMBEDDING.replace("weight", part) for part in PARTS}
    heads = {head: embedding for head, embedding in heads.items() if head in tensors}
    if HEAD not in heads:
        return TiedHead(tied is None or tied)
    if not tied:
        return TiedHead(False)
    if EMBEDDING not in tensors:
        logger.warning(f"{EMBEDDING} is not in the weights: {HEAD}, to which config.json ties it, is both")
        return TiedHead(True, renamed=heads)
    embeddings = {name for name in tensors if name.startswith(EMBEDDING.removesuffix("weight"))}
    if embeddings != set(heads.values()) or (same is not None and not all(map(same, heads, heads.values()))):
        logger.warning(f"{HEAD} differs from {EMBEDDING}, to which config.json ties it: both are used, untied")
        return TiedHead(False)
    return TiedHead(True, left_out=heads, compared=same is not None)
