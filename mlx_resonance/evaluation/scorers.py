"""The scorers of L-Eval: functions of an answer and its reference, from 0 to 1.

Reimplemented from the behavior of the benchmark's own code, with the quirks that published numbers depend on.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

LETTERS = "ABCD"
PARTIAL = 0.25  # for some of the right letters, and no wrong one


def normalize(text: str) -> str:
    """A text in lower case, without punctuation, articles and repeated spaces.

    Source: SQuAD's evaluate-v1.1.py, as in L-Eval's Evaluation/f1.py.
    """
    return _plain(text.lower())


def _plain(text: str) -> str:
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the normalized words, each counted as often as it occurs in both.

    Source: as `normalize`.
    """
    return _overlap(normalize(prediction).split(), normalize(reference).split())


def exact_match(prediction: str, reference: str) -> float:
    """Whether an answer is the reference: the same letters A to D, the same number, or a text that contains it.

    Some of several letters, and no wrong one, score 0.25. In texts, spaces and case do not count.

    Source: L-Eval's Evaluation/em.py, exact_match_score.
    """
    said, right = _plain(prediction), _plain(reference)
    if set(right) <= set(LETTERS):
        return 1.0 if said == right else PARTIAL if set(said) <= set(right) else 0.0
    try:
        return float(float(prediction) == float(reference))
    except ValueError:
        return float(_squeeze(reference) in _squeeze(prediction))


def letter_choice(prediction: str, reference: str) -> float:
    """Whether the one letter that an answer chooses is the reference's; an answer without letters chooses A.

    Source: L-Eval's Evaluation/auto_eval.py, process_output_mc: the first capital A to D counts, so "Answer: B" is A.
    """
    first = re.search(f"[{LETTERS}]", prediction)
    return letters_choice(first[0] if first and prediction not in LETTERS else prediction, reference)


def letters_choice(prediction: str, reference: str) -> float:
    """`letter_choice` for several right letters: 1 for all of them, 0.25 for some of them and no wrong one.

    The letters are those at the very start and, if these are less than two, the ones before a space, a period or a
    bracket, or else the first run of letters.

    Source: as `letter_choice` (Coursera).
    """
    if not prediction.strip():
        return 0.0
    return exact_match(_chosen_letters(prediction), _reference_letters(reference))


def _chosen_letters(answer: str) -> str:
    if answer in LETTERS:
        return answer
    rest = answer.lstrip(LETTERS)
    chosen = answer[: len(answer) - len(rest)]
    if len(chosen) < 2:
        rest = rest.split("Question")[0]
        chosen += "".join(re.findall(rf"[{LETTERS}](?=[\s.)])", rest))
    run = re.search(f"[{LETTERS}]+", rest)
    return "".join(sorted(set(chosen))) or (run[0] if run else "A")


def _reference_letters(reference: str) -> str:
    first = reference.split()[0] if reference.strip() else ""
    return "".join(c for c in first if c in LETTERS) or "A"


def last_number(prediction: str, reference: str) -> float:
    """Whether an answer has the reference's number after "The answer is", or else as the last of its first paragraph.

    Only the digits before a period count: $1,200.50 is 1200.

    Source: L-Eval's Evaluation/auto_eval.py, process_math (GSM).
    """
    return exact_match(_number(prediction), _number(reference))


def _number(answer: str) -> str:
    found = re.search(r"The answer is (\S+)", answer)
    words = [found[1]] if found else answer.split("\n\n")[0].split(" ")[::-1]
    word = next((word for word in words if re.search("[0-9]", word)), "")
    return "".join(re.findall("[0-9]", word.split(".")[0]))


def code_output(prediction: str, reference: str) -> float:
    """Whether an answer has the output of a program after "the final output", or at its end.

    Searched in three words more than the reference has; commas, quotes and ".0" do not count.

    Source: L-Eval's Evaluation/auto_eval.py, process_output_code (CodeU).
    """
    answer = _code(prediction)
    for filler in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        answer = answer.replace(filler, "")
    count = len(reference.split()) + 3
    _, found, after = answer.rpartition("the final output")
    words = re.split(r"\s+", after)
    return exact_match(" ".join(words[:count] if found else words[-count:]), _code(reference))


def _code(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    for spaced, close in (("] [", "]["), ("[ [", "[["), ("] ]", "]]")):
        text = text.replace(spaced, close)
    return text


def truth(prediction: str, reference: str) -> float:
    """Whether the first word with "true" or "false" in it says the same as the reference.

    Source: L-Eval's Evaluation/auto_eval.py, process_output_judge (SFiction).
    """
    return exact_match(_verdict(prediction), reference.lower())


def _verdict(answer: str) -> str:
    for word in answer.lower().split():
        for verdict in ("true", "false"):
            if verdict in word:
                return verdict
    return ""


def rouge_n(prediction: str, reference: str, n: int) -> float:
    """ROUGE-N, F-measure: common n-grams of words, each counted as often as it occurs in both.

    Words are runs of a to z and digits, in lower case, without stemming.

    Source: Lin 2004; equal to the package rouge-score with use_stemmer=False, which L-Eval uses.
    """
    one, other = _words(prediction), _words(reference)
    return _overlap(*([tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (one, other)))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L, F-measure: the longest common subsequence of words. Words and source as in `rouge_n`."""
    one, other = _words(prediction), _words(reference)
    return _harmonic(_common_subsequence(one, other), len(one), len(other))


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        above, row = row, [0]
        for j, candidate in enumerate(other):
            row.append(above[j] + 1 if word == candidate else max(above[j + 1], row[j]))
    return row[-1]


def _squeeze(text: str) -> str:
    return text.lower().replace(" ", "")


def _overlap(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    return _harmonic((Counter(one) & Counter(other)).total(), len(one), len(other))


def _harmonic(common: int, one: int, other: int) -> float:
    """The harmonic mean of the two shares that `common` has of each side."""
    return 2 * common / (one + other) if common else 0.0
