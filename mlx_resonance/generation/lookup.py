"""Prompt lookup: which tokens followed the longest earlier match of a text's end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ..errors import check_option
from .speculation import Proposals

PromptLookup: TypeAlias = int | Literal["auto", "off"]

NGRAM = 3  # tokens of the matches whose occurrences are searched; of shorter ones, of two, the latest is known
CANDIDATES, LONGEST = 64, 32  # bounds of a search: latest occurrences that are compared, tokens compared of each
MOST_PROPOSED = 64  # tokens that a user may ask for
BITS = 21  # of a token's id in the key of an n-gram; where ids are longer, different n-grams may share a key
PAIR, TRIPLE = (1 << 2 * BITS) - 1, (1 << NGRAM * BITS) - 1


class Lookup:
    """An index of a text that grows: the tokens that followed the longest earlier match of its end, of two or more.

    A match that was found is followed for as long as the text continues it. Where it ends, the latest occurrences of
    the last three tokens are compared backwards, and of the longest matches the latest one counts; without any, the
    latest occurrence of the last two. A search compares at most `candidates` × (`longest` + 2) tokens, so that a token
    costs bounded time however long the text is. Within these bounds the match is the longest one; past them it is one
    of those.

    It takes about 210 bytes per token of text without repetitions, 130 of prose: 8 for the token, 4 for the chain of
    occurrences, the rest for entries of dictionaries, which repetitions share. It indexes 100,000 tokens in 0.15 s.

    Args:
        tokens: the beginning of the text.
        candidates, longest: bounds of a search.
    """

    def __init__(self, tokens: Sequence[int] = (), *, candidates: int = CANDIDATES, longest: int = LONGEST) -> None:
        self.candidates, self.longest = candidates, longest
        self.comparisons = 0  # pairs of tokens compared so far
        self._tokens: list[int] = []
        self._latest: dict[int, int] = {}  # from three tokens to where their latest occurrence ends
        self._before = array("i")  # for each token: where the occurrence before the one that it completes ends, or 0
        self._pairs: dict[int, int] = {}  # from two tokens to where their latest occurrence ends
        self._pair = 0  # where the occurrence of the last two tokens before ends, or 0
        self._key = 0
        self._end = self._length = 0  # of the match: where it ends, or 0 for none that is known, and its tokens
        for token in tokens:
            self._index(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, token: int) -> None:
        """Add a token to the text."""
        follows = self._end and self._tokens[self._end] == token
        self.comparisons += bool(self._end)
        self._end, self._length = (self._end + 1, self._length + 1) if follows else (0, 0)
        self._index(token)

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that followed the match, fewer if the text ends before; none without a match."""
        if not self._end:
            self._end, self._length = self._search()
        return self._tokens[self._end : self._end + count] if self._end else []

    @property
    def matched(self) -> int:
        """Tokens of the match that `propose` found, 0 for none."""
        return self._length

    def _index(self, token: int) -> None:
        self._tokens.append(token)
        self._key = key = (self._key << BITS | token) & TRIPLE
        end, before = len(self._tokens), 0
        if end >= 2:
            self._pair = self._pairs.get(key & PAIR, 0)
            self._pairs[key & PAIR] = end
        if end >= NGRAM:
            before = self._latest.get(key, 0)
            self._latest[key] = end
        self._before.append(before)

    def _search(self) -> tuple[int, int]:
        """Where the longest match ends, and its length; of equally long ones the latest."""
        best, most = 0, 0
        end = self._before[-1] if self._tokens else 0
        for _ in range(self.candidates):
            if not end or most >= self.longest:
                break
            length = self._common(end, most)
            if length > most and length >= NGRAM:
                best, most = end, length
            end = self._before[end - 1]
        if not best and (end := self._pair) and self._tokens[end - 2 : end] == self._tokens[-2:]:
            return end, 2
        return best, most

    def _common(self, end: int, most: int) -> int:
        """How many tokens before `end` are those at the text's end; 0 if it is certain that they are at most `most`."""
        tokens, last = self._tokens, len(self._tokens)
        if end <= most:
            return 0
        self.comparisons += 1
        if tokens[end - 1 - most] != tokens[last - 1 - most]:
            return 0
        limit, length = min(end, self.longest), 0
        while length < limit and tokens[end - 1 - length] == tokens[last - 1 - length]:
            length += 1
        self.comparisons += min(length + 1, limit)
        return length


def lookup_proposals(tokens: Sequence[int], setting: PromptLookup) -> Proposals | None:
    """Proposals for the answer to a prompt; None for plain decoding.

    Args:
        tokens: the prompt.
        setting: `auto` for as many tokens as pay, `off` for none, or their number.
    """
    if setting == "off":
        return None
    return Proposals(LookupProposer(tokens), None if setting == "auto" else setting)


def check_lookup(setting: PromptLookup) -> None:
    """Raise UsageError if it is not a setting of `lookup_proposals`."""
    number = isinstance(setting, int) and not isinstance(setting, bool) and 1 <= setting <= MOST_PROPOSED
    check_option("prompt_lookup", number or setting in ("auto", "off"), f"auto, off or 1 to {MOST_PROPOSED}", setting)


class LookupProposer:
    """Proposes what followed earlier in prompt and answer: a `Proposer`. The index is built when it is first asked.

    Args:
        tokens: the prompt.
    """

    free = True

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text = list(tokens)
        self._lookup: Lookup | None = None

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next."""
        if self._lookup is None:
            self._lookup, self._text = Lookup(self._text), []
        return self._lookup.propose(count)

    def accepted(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        if self._lookup is None:
            self._text.extend(tokens)
            return
        for token in tokens:
            self._lookup.append(token)
