"""The text of an answer, from its token ids."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper


class AnswerText:
    """The text of an answer, token by token.

    Args:
        tokenizer: from `load`.
        first_space: keep a space that the answer begins with, as the token ids have it; mlx-lm's streaming detokenizers
            drop it.
    """

    def __init__(self, tokenizer: TokenizerWrapper, first_space: bool = True) -> None:
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.detokenizer
        self._first: list[int] | None = [] if first_space else None

    def add(self, token: int) -> str:
        """The text that became certain with the next token."""
        self._detokenizer.add_token(token)
        if self._first is not None:
            self._first.append(token)
        return self._piece()

    def finish(self) -> str:
        """The text that is left."""
        self._detokenizer.finalize()
        return self._piece()

    def _piece(self) -> str:
        piece = str(self._detokenizer.last_segment)
        if piece and self._first is not None:
            whole, self._first = text_of(self._tokenizer, self._first), None
            if whole.startswith(" ") and not piece.startswith(" "):
                return f" {piece}"
        return piece


def text_of(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> str:
    """The text of an answer. Unlike that of a streaming detokenizer, it has the space that it may begin with."""
    return str(tokenizer.decode(list(tokens)))
