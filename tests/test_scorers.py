"""Scores of answers, computed by hand: each case says why."""

from __future__ import annotations

from mlx_resonance.evaluation import scorers

import pytest


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("The cat sat.", "a cat sat down", 0.8),  # cat sat | cat sat down: precision 1, recall 2/3
        ("cat cat", "cat", 2 / 3),  # one of two, one of one
        ("cat-sat", "cat sat", 0),  # without its hyphen it is one word
        ("Sat the CAT", "cat sat", 1),  # order, case and articles do not count
        ("the", "the", 0),  # nothing left of either
        ("", "cat", 0),
    ],
)
def test_f1(prediction: str, reference: str, worth: float) -> None:
    assert scorers.f1(prediction, reference) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("B", "B", 1),
        ("(B) since it rains", "B", 1),
        ("D.", "(D) Terra", 1),  # the reference's letter is in its first word
        ("Answer: B", "B", 0),  # the first capital A to D is that of Answer
        ("Answer: B", "A", 1),
        ("The correct one is C, not D", "C", 1),
        ("AB", "A", 0),  # a whole answer of letters is all of them
        ("A", "AB", 0.25),  # a part of what is right
        ("none of these", "A", 1),  # no letter: A
        ("none of these", "B", 0),
        ("", "A", 0),  # no answer: nothing, not A
        (" \n", "A", 0),
    ],
)
def test_letter_choice(prediction: str, reference: str, worth: float) -> None:
    assert scorers.letter_choice(prediction, reference) == worth


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("AB", "AB", 1),
        ("BA", "AB", 1),
        ("BA, I think", "AB", 1),  # at the start, in any order
        ("A", "AB", 0.25),  # some and no other
        ("AC", "AB", 0),  # a wrong one
        ("ABC", "AB", 0),
        ("A. It rains B) it snows", "AB", 1),  # before a period and a bracket
        ("the answer: CD", "CD", 1),  # nothing else: the first run of letters
        ("the answer: DC", "CD", 0.25),  # that is not put in order, so only a part of what is right
        ("A Question 2: B.", "AB", 0.25),  # the next question does not count
        ("E", "A", 1),  # no letter: A
        ("", "AB", 0),
    ],
)
def test_letters_choice_gives_partial_credit(prediction: str, reference: str, worth: float) -> None:
    assert scorers.letters_choice(prediction, reference) == worth


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("The answer is $1,200.50.", "1200", 1),  # the digits before the first period
        ("The answer is 5 and not 6", "5", 1),  # not the last one
        ("He has 5 and 7 apples", "7", 1),  # the last one, without these words
        ("He has 5 and 7 apples", "5", 0),
        ("so 3\n\nThen 9", "3", 1),  # of the first paragraph
        ("so 3\n\nThen 9", "9", 0),
        ("about 2.9", "2", 1),
        ("007", "7", 1),  # numbers, not texts
        ("7 apples", "#### 7", 1),
        ("no number", "5", 0),
        ("", "5", 0),
    ],
)
def test_last_number(prediction: str, reference: str, worth: float) -> None:
    assert scorers.last_number(prediction, reference) == worth


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("It was The Role of Art, first", "the role of art", 1),  # case aside
        ("theroleofart", "the role of art", 1),  # spaces aside
        ("the role of music", "the role of art", 0),
        ("10.0", "10", 1),  # two numbers
        ("10 dogs", "10", 1),  # a number in a text
        ("110 dogs", "10", 1),  # L-Eval's quirk: any part of the text
        ("", "the role of art", 0),
    ],
)
def test_exact_match(prediction: str, reference: str, worth: float) -> None:
    assert scorers.exact_match(prediction, reference) == worth


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("the final output will be [1, 2, 3]. Because 4", "[1, 2, 3]", 1),
        ("[ [1, 2] , [3] ]", "[[1, 2], [3]]", 1),  # spaces and commas aside
        ("I ran it. It is 'abc'", "abc", 1),  # at the end, without quotes
        ("5.0", "5", 1),
        ("4 is what it prints, and there is more to be said about it", "4", 0),  # the last 4 words have no 4
        ("the final output of the code is 7", "8", 0),
        ("", "8", 0),
    ],
)
def test_code_output(prediction: str, reference: str, worth: float) -> None:
    assert scorers.code_output(prediction, reference) == worth


@pytest.mark.parametrize(
    ("prediction", "reference", "worth"),
    [
        ("True.", "True", 1),
        ("FALSE", "False", 1),
        ("false, though it seems true", "False", 1),  # the first one
        ("It is not true", "True", 1),  # L-Eval's quirk: the word alone
        ("who knows", "True", 0),
        ("who knows", "False", 0),
        ("", "True", 0),
    ],
)
def test_truth(prediction: str, reference: str, worth: float) -> None:
    assert scorers.truth(prediction, reference) == worth


def test_rouge() -> None:
    said, right = "The cat sat!", "the cat ran away"
    assert scorers.rouge_n(said, right, 1) == pytest.approx(2 * 2 / (3 + 4))  # the, cat
    assert scorers.rouge_n(said, right, 2) == pytest.approx(2 * 1 / (2 + 3))  # the cat
    assert scorers.rouge_l(said, right) == pytest.approx(2 * 2 / (3 + 4))  # the cat
    assert scorers.rouge_l("b a", "a b") == pytest.approx(0.5)  # a, or b
    assert scorers.rouge_l("a x b y c", "a b c") == pytest.approx(2 * 3 / (5 + 3))  # with gaps
    assert scorers.rouge_n("one", "one", 2) == 0  # no pair in either
    for empty in ("", "...", "猫"):
        assert scorers.rouge_n(empty, right, 1) == scorers.rouge_l(empty, right) == 0
