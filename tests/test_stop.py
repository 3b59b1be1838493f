"""Stop strings, against a search in the whole text, character by character."""

from __future__ import annotations

from mlx_resonance.errors import UsageError
from mlx_resonance.generation.stop import StopStrings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

WORDS = st.text(alphabet="ab\n", min_size=1, max_size=4)


def before_the_first(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, read character by character, and whether there is one."""
    for end in range(len(text) + 1):
        if ended := [word for word in stop if text[:end].endswith(word)]:
            return text[: end - max(map(len, ended))], True
    return text, False


@example("\naa", ["a", "\naa"], [])
@example("\naa", ["a", "\naa"], [2])  # the shorter one is complete before the one that starts earlier
@given(st.text(alphabet="ab\n", max_size=40), st.lists(WORDS, max_size=4), st.lists(st.integers(0, 40), max_size=12))
def test_a_text_ends_before_the_first_stop_string_however_it_is_cut(text: str, stop: list[str], cuts: list[int]):
    stops, got = StopStrings(stop), ""
    ends = sorted({*cuts, len(text)})
    for start, end in zip([0, *ends], ends, strict=False):
        if stops.found:
            break
        got += stops.add(text[start:end])
        assert len(got) <= end and text.startswith(got)
    assert (got + ("" if stops.found else stops.finish()), stops.found) == before_the_first(text, stop)


def test_nothing_is_held_back_that_cannot_begin_a_stop_string() -> None:
    stops = StopStrings(["</answer>"])
    assert [stops.add(piece) for piece in ("a <", "b </ans", "x", "</answer")] == ["a ", "<b ", "</ansx", ""]
    assert stops.add(">") == "" and stops.found


@pytest.mark.parametrize(
    ("stop", "says"), [("a", "a list"), (["a", ""], "empty"), ([b"a"], "not a string"), (["a"] * 65, "at most 64")]
)
def test_wrong_stop_strings_are_refused(stop: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        StopStrings(stop)  # type: ignore[arg-type]
