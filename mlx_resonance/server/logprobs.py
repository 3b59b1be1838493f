"""Log-probabilities of tokens, and what tokens are called."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.stream import Response
from .responses import Alternative, TokenLogprob

LEAST = -9999.0  # what OpenAI says for the log-probability of a token that cannot come


def logprob_of(tokenizer: TokenizerWrapper, response: Response, alternatives: int) -> TokenLogprob:
    """A token's log-probability, and as many of the likeliest tokens'."""
    row = response.logprobs.reshape(-1).astype(mx.float32)
    row = row - mx.logsumexp(row)  # in 16 bits, the sum over the vocabulary was rounded to eighths
    ids: Any = [] if not alternatives else mx.argpartition(-row, kth=alternatives - 1)[:alternatives].tolist()
    values: Any = row[mx.array([response.token, *ids])].tolist()
    best = sorted(zip(ids, values[1:], strict=True), key=lambda found: -found[1])
    others = [_alternative(tokenizer, number, value) for number, value in best]
    own = _alternative(tokenizer, response.token, values[0])
    return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=others)


def _alternative(tokenizer: TokenizerWrapper, number: int, logprob: float) -> Alternative:
    text = tokenizer.decode([number])
    token = tokenizer.convert_ids_to_tokens(number) or ""
    if token.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # sentencepiece drops a space at the beginning of a text
    found: bytes | None = text.encode()
    if "\ufffd" in text:  # part of a character, whose name is OpenAI's
        found = bytes_of(token)
        text = text if found is None else _name(found)
    return Alternative(
        token=text, logprob=logprob if logprob > LEAST else LEAST, bytes=None if found is None else list(found)
    )


def _name(found: bytes) -> str:
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token of a vocabulary stands for; None if that cannot be known.

    Args:
        token: `<0xE6>` in sentencepiece's vocabularies, a letter for each byte in those that encode bytes as letters.
    """
    if match := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(match[1])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else None


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters: a printable character is its own byte, the other bytes are those from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
