"""Prompts of a batch that begin alike: the order in which each beginning has to be read only once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from .prompt_cache import common_prefix

SHARED = 512  # tokens; rather than read a shorter beginning on its own, every prompt of a batch reads it


def by_beginning(prompts: Sequence[list[int]], least: int) -> list[tuple[int, int]]:
    """Order prompts so that those with the same beginning follow each other; otherwise the order stays.

    Args:
        prompts: their token ids.
        least: a beginning of fewer tokens does not count.

    Returns:
        For each prompt its index, and how many tokens it shares with the prompt before or after it: all but its last
        token at most, 0 if they are fewer than `least`.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    groups: list[list[tuple[int, int]]] = []
    before = 0  # shared with the last one
    for i, following in zip_longest(order, order[1:]):
        after = 0 if following is None else common_prefix(prompts[i], prompts[following])
        shared = min(max(before, after), len(prompts[i]) - 1)
        if before < least:
            groups.append([])
        groups[-1].append((i, shared if shared >= least else 0))
        before = after
    return [entry for group in sorted(groups, key=min) for entry in group]
