"""Prompt lookup: the index, how much is proposed, and that an answer in fewer passes is the plain one."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mlx_resonance.generation import speculation
from mlx_resonance.generation.lookup import Lookup, LookupProposer
from mlx_resonance.generation.speculation import Proposals, Times

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# The index.


def longest_match(text: list[int]) -> tuple[int, int]:
    """Where the longest earlier match of the text's end ends, the latest of equally long ones, and its length."""
    best, most = 0, 0
    for end in range(1, len(text)):
        length = 0
        while length < end and text[end - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length >= max(most, 2):
            best, most = end, length
    return best, most


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.integers(0, 2), max_size=60),
    split=st.integers(0, 60),
    asked=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_it_proposes_what_followed_the_longest_match(text: list[int], split: int, asked: list[bool]) -> None:
    lookup = Lookup(text[:split], candidates=100, longest=100)
    for known in range(len(text[:split]), len(text) + 1):
        if asked[known - 1] or known == len(text):
            end, length = longest_match(text[:known])
            assert lookup.propose(7) == (text[end:known][:7] if length else [])
            assert lookup.matched == length
        if known < len(text):
            lookup.append(text[known])
    assert len(lookup) == len(text)


@settings(deadline=None, max_examples=100)
@given(text=st.lists(st.integers(0, 2), min_size=20, max_size=200), split=st.integers(0, 100))
def test_past_its_bounds_it_proposes_what_followed_some_match(text: list[int], split: int) -> None:
    lookup = Lookup(text[:split], candidates=2, longest=5)
    for known in range(len(text[:split]), len(text)):
        proposed, before = lookup.propose(4), text[:known]
        if proposed:
            ends = [end for end in range(2, known) if before[end - 2 : end] == before[-2:]]
            assert proposed in [before[end : end + 4] for end in ends]
        else:
            assert longest_match(before) == (0, 0)
        lookup.append(text[known])


@pytest.mark.parametrize("period", [1, 2, 97])
def test_a_token_costs_no_more_comparisons_in_a_longer_text(period: int) -> None:
    """Texts that repeat, and that break off where the match is longest: the worst that a search can meet."""
    chosen = random.Random(0)
    worst = {}
    for length in (1_000, 50_000):
        lookup = Lookup([place % period for place in range(length)])
        most = 0
        for place in range(length, length + 500):
            before = lookup.comparisons
            lookup.propose(16)
            lookup.append(place % period if chosen.random() < 0.9 else 100 + place % 3)
            most = max(most, lookup.comparisons - before)
        worst[length] = most
    assert worst[50_000] <= 64 * (32 + 2) + 1
    assert worst[50_000] <= 2 * worst[1_000] + 64


def test_ids_of_any_size_are_told_apart() -> None:
    lookup = Lookup([2**31 - 1, 2**21, 5, 7, 2**31 - 1, 2**21, 5])
    assert lookup.propose(9) == [7, 2**31 - 1, 2**21, 5]
    assert Lookup([1, 5, 7, 0, 2**21 + 5]).propose(9) == []  # their keys are the same
    for three in ([9, 0, 2**21 + 5], [8, 2**21 + 1, 5]):
        assert Lookup([9, 1, 5, 7, *three]).propose(9) == []


def test_the_index_is_built_when_it_is_asked_and_knows_what_was_written_before() -> None:
    proposer = LookupProposer([1, 2, 3, 4, 5])
    proposer.accepted([9, 1])
    assert proposer.propose(3) == []
    proposer.accepted([2])
    assert proposer.propose(3) == [3, 4, 5]


# How much is proposed.


class Script:
    """A proposer that always proposes zeros."""

    def __init__(self, free: bool = False) -> None:
        self.free, self.text = free, []

    def propose(self, count: int) -> list[int]:
        return [0] * count

    def accepted(self, tokens: Sequence[int]) -> None:
        self.text += tokens


class Run:
    """Passes of a model of which a plain one takes a second, and one with k proposed tokens 1 + k × `each`.

    Args:
        proposals: the controller.
        each: seconds of a proposed token.
    """

    def __init__(self, proposals: Proposals, each: float) -> None:
        self.proposals, self.each = proposals, each
        self.seconds, self.tokens, self.lengths = 0.0, 0, []
        proposals._read = True  # of a proposer that is not free, the prompt
        for _ in range(3):
            self.proposals.passed(0, [1], 1.0)
        for proposed in (1, 2, 4, 8, 16, 32):  # the first ones of each length do not count
            proposals.times.add(proposed, 100.0)

    def step(self, right: int) -> int:
        """A pass in which at most `right` proposed tokens are accepted. Returns how many were proposed."""
        proposed = self.proposals.propose(1000)
        accepted = min(right, len(proposed))
        self.proposals.passed(len(proposed), [0] * accepted + [1], 1 + self.each * len(proposed))
        self.seconds += 1 + self.each * len(proposed)
        self.tokens += accepted + 1
        self.lengths.append(len(proposed))
        return len(proposed)


def test_the_length_doubles_when_all_is_accepted_and_halves_when_nothing_is() -> None:
    run = Run(Proposals(Script()), each=0.01)
    assert [run.step(right=99) for _ in range(5)] == [4, 8, 16, 32, 32]
    assert [run.step(right=1) for _ in range(2)] == [32, 32]
    assert [run.step(right=0) for _ in range(7)] == [32, 16, 8, 4, 2, 1, 1]


def test_a_shorter_proposal_that_is_accepted_does_not_lengthen_the_next() -> None:
    proposals = Proposals(Script())
    assert len(proposals.propose(2)) == 2
    proposals.passed(2, [0, 0, 1], 1.0)
    assert len(proposals.propose(99)) == 4


def test_proposals_that_pay_never_pause() -> None:
    run = Run(Proposals(Script()), each=0.4)
    for _ in range(200):
        run.step(right=2)  # 3 tokens for at most 1 + 4 × 0.4 = 2.6 seconds
    assert min(run.lengths) == 4
    assert run.tokens > run.seconds


def test_proposals_that_lose_pause_by_what_was_measured() -> None:
    run = Run(Proposals(Script()), each=0.75)
    assert [run.step(right=2) for _ in range(4)] == [4, 4, 0, 0]  # 3 tokens for 1 + 4 × 0.75 seconds: two lose 2


def test_a_slow_loss_is_noticed_after_64_tokens() -> None:
    run = Run(Proposals(Script()), each=0.505)
    while run.step(right=2):  # 3 tokens for 3.02 seconds
        pass
    assert 60 < run.tokens < 70


def test_what_was_lost_before_a_pause_does_not_count_after_it() -> None:
    run = Run(Proposals(Script()), each=0.15)
    while run.step(right=0):
        pass
    while not run.step(right=0):
        pass
    assert run.step(right=0)


def test_a_median_time_counts_and_the_first_pass_of_a_length_only_until_there_is_a_second() -> None:
    times = Times()
    times.add(4, 100.0)
    assert times.of(4) == times.of(7) == 100 and times.of(3) is None and times.of(0) is None
    times.add(0, 0.5)
    assert (times.of(4), times.of(7), times.of(0)) == (2.5, 4.0, 0.5)  # its tokens one by one
    for seconds in (1.0, 1.1, 50.0, 0.9):
        times.add(4, seconds)
    assert times.of(4) == times.of(7) == 1.0


@pytest.mark.parametrize(("each", "most"), [(0.05, 32), (0.125, 32), (0.3, 13), (0.8, 5)])
def test_a_wrong_proposal_costs_about_four_passes_at_most(each: float, most: int) -> None:
    run = Run(Proposals(Script()), each)
    lengths = [run.step(right=99) for _ in range(12)]
    assert most <= max(lengths[1:]) < 2 * most  # times are known by powers of two
    assert len(set(lengths[-4:])) <= 2


@pytest.mark.parametrize("right", [0, 1, 2])
def test_where_tokens_cost_nearly_a_pass_each_little_is_lost_from_the_first_one_on(right: int) -> None:
    """Nothing is known but one plain pass; 4-bit weights on a CPU."""
    proposals, lost = Proposals(Script()), 0.0
    proposals._read = True
    proposals.passed(0, [1], 1.0)
    while proposed := len(proposals.propose(99)):
        seconds = 1 + 0.86 * proposed
        proposals.passed(proposed, [0] * min(right, proposed) + [1], seconds)
        lost += seconds - 1 - min(right, proposed)
    assert lost < 4.5


def test_reading_the_prompt_is_not_the_time_of_a_pass() -> None:
    proposals = Proposals(Script(free=False))
    proposals.passed(0, [1], 1.0)
    for seconds in (500.0, 2.0, 2.0):
        assert len(proposals.propose(4)) == 4
        proposals.passed(4, [0, 0, 0, 1], seconds)
    assert proposals.times.of(4) == 2.0 and not proposals.paused


def test_pauses_grow_and_fresh_text_keeps_its_speed() -> None:
    run = Run(Proposals(Script()), each=0.1)
    while run.tokens < 5000:
        run.step(right=0)
    pauses = [len(part) for part in "".join("x" if n else "." for n in run.lengths).split("x") if len(part) > 1]
    assert pauses[:6] == [64, 128, 256, 512, 1024, 1024]
    assert run.tokens / run.seconds > 0.98


def test_the_last_tokens_decide_not_the_gains_before_them() -> None:
    run = Run(Proposals(Script()), each=0.1)
    for _ in range(50):
        run.step(right=99)
    before = run.seconds - run.tokens
    steps = 0
    while run.step(right=0):
        steps += 1
    assert run.seconds - run.tokens - before < 5 and steps < 20


def test_a_gain_starts_the_pauses_anew() -> None:
    run = Run(Proposals(Script()), each=0.1)
    while run.tokens < 600:
        run.step(right=0)
    while not run.step(right=99):
        pass
    for _ in range(3):
        run.step(right=99)
    run.lengths.clear()
    while run.tokens < 1200:
        run.step(right=0)
    pauses = [len(part) for part in "".join("x" if n else "." for n in run.lengths).split("x") if len(part) > 1]
    assert pauses[0] == 64


def test_a_pause_ends_when_guesses_would_have_been_right() -> None:
    run = Run(Proposals(Script(free=True)), each=0.3)
    while run.step(right=0):
        pass
    proposals = run.proposals
    assert proposals.paused > 10
    for run_of in (2, 3):  # the second pause asks for more
        for token in [0] * (run_of - 1) + [1] + [0] * (run_of - 1):
            proposals.passed(0, [token], 1.0)
            assert proposals.propose(9) == [] and not proposals.awaits()
        proposals.passed(0, [0], 1.0)
        assert proposals.awaits() and len(proposals.propose(9)) == speculation.FIRST
        while run.step(right=0):
            pass


def test_a_fixed_number_is_always_proposed() -> None:
    run = Run(Proposals(Script(), 7), each=5.0)
    assert [run.step(right=0) for _ in range(100)] == [7] * 100
    assert len(Proposals(Script(), 7).propose(3)) == 3 and Proposals(Script(), 7).propose(0) == []


def test_every_token_reaches_the_proposer() -> None:
    script = Script()
    proposals = Proposals(script)
    for tokens in ([5], [0, 0, 6], [7]):
        proposals.passed(len(tokens) - 1, tokens, 1.0)
    assert script.text == [5, 0, 0, 6, 7]
