"""An answer on a terminal and in a pipe, and the line after it."""

from __future__ import annotations

import io
import re

from mlx_resonance.cli.answer import Printer, summary
from mlx_resonance.generation.stream import Response

import mlx.core as mx
from hypothesis import example, given
from hypothesis import strategies as st


def printed(pieces: list[str], width: int) -> str:
    """What a printer writes, without the last line break."""
    out = io.StringIO()
    printer = Printer(out, width)
    for piece in pieces:
        printer.write(piece)
    printer.finish()
    assert out.getvalue().endswith("\n")
    return out.getvalue()[:-1]


@given(st.lists(st.text(max_size=12), max_size=12))
def test_a_pipe_gets_every_byte(pieces: list[str]) -> None:
    assert printed(pieces, 0) == "".join(pieces)


@given(st.lists(st.text(alphabet="abc \n", max_size=12), max_size=20), st.integers(5, 30))
@example([" a", "a", "aaa"], 5)
def test_a_terminal_gets_every_word_and_no_line_too_long(pieces: list[str], width: int) -> None:
    text, shown = "".join(pieces), printed(pieces, width)
    assert shown.split() == text.split()
    for line in shown.split("\n"):
        assert len(line.rstrip()) <= width or max(map(len, line.split())) > width
    assert shown.count("\n") >= text.count("\n")


def test_lines_break_at_words_and_words_are_not_cut() -> None:
    assert printed(["one two thr", "ee four"], 9) == "one two\nthree\nfour"
    assert printed(["日本 日本 日本"], 9) == "日本 日本\n日本"  # two columns each


def test_what_a_model_writes_does_not_control_the_terminal() -> None:
    text = "a\x1b[2Jb\x07\x9b31m\r\u202ec\x00"
    assert printed([text], 40) == "a[2Jb31mc"
    assert printed([text], 0) == text


def response(**changes: object) -> Response:
    """A last response."""
    values = {
        "text": "", "token": 1, "logprobs": mx.array([0.0]), "from_draft": False, "prompt_tokens": 4096,
        "prompt_tps": 850.0, "generation_tokens": 24, "generation_tps": 12.3, "peak_memory": 1.25,
        "finish_reason": "stop", "cached_tokens": 0,
    }  # fmt: skip
    return Response(**(values | changes))  # type: ignore[arg-type]


def test_the_summary_says_what_came_from_the_cache_and_from_the_checkpoint() -> None:
    assert summary(response(), {}) == (
        "prompt 4,096 tokens, 850 tokens/s; generated 24 tokens, 12 tokens/s; peak memory 1.25 GB"
    )
    cached = summary(response(cached_tokens=4052, prompt_tps=0.4), {"temp": 0.6, "top_k": 40})
    assert cached.startswith("4,052 of 4,096 prompt tokens from the cache, 44 read at 0.4 tokens/s; generated")
    assert cached.endswith("; temp 0.6, top_k 40 from generation_config.json")
    whole = summary(response(cached_tokens=4095, prompt_tps=0.01), {})
    assert not re.search(r"\b0(\.0)? tokens/s", whole)
