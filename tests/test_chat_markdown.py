"""Answers as markdown on a terminal: however they are cut into pieces, and nothing that controls the terminal."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise

from mlx_resonance.cli import markdown
from mlx_resonance.cli.markdown import Rendered, first_block

import pytest
from rich.console import Console

MARKDOWN = """# Title

Some *words* and <b>html</b>, a [link](http://x.y) and `code`.
A line \x1b]0;title\x07of \x1b[2Jits own

1. one

2. two

   more of two

**Bold** text

```python
def f(x):

    return x + 1
```

| a | b |
|---|---|
| 1 | 2 |

End."""
SHOWN = """Title
Some words and <b>html</b>, a link (http://x.y) and code.
A line ]0;titleof [2Jits own
1 one
2 two
more of two
Bold text
def f(x):
return x + 1
a  b
────
1  2
End."""


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_markdown_however_it_is_cut(size: int) -> None:
    """Without pictures of unfinished blocks, the same lines; nothing of the model's reaches the terminal as control."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system="standard")
    rendered = Rendered(console)
    rendered._next = math.inf
    for at in range(0, len(MARKDOWN), size):
        rendered.write(MARKDOWN[at : at + size])
    rendered.finish()
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # Rich's colours
    assert "\x1b" not in shown and "\x07" not in shown
    lines = [line.strip() for line in shown.splitlines()]
    assert [line for line in lines if line] == SHOWN.splitlines()
    assert not any(one == other == "" for one, other in pairwise(lines))


def test_unfinished_blocks_fit_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=10, color_system="standard")
    monkeypatch.setattr(markdown, "REDRAW", 0)
    monkeypatch.setattr(markdown, "SHARE", 0)
    rendered = Rendered(console)
    for number in range(30):
        rendered.write(f"line {number}\n")
    rendered.write("\nnext")
    erased = [len(found[0]) // len("\x1b[1A\x1b[2K") for found in re.finditer(r"(\x1b\[1A\x1b\[2K)+", out.getvalue())]
    assert max(erased) == 8  # what has scrolled off a screen cannot be drawn anew
    assert all(f"line {number} " in out.getvalue().rpartition("\x1b[2K")[2] for number in range(30))
    rendered.finish()
    assert out.getvalue().rstrip().endswith("next")
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")  # the cursor is there again


@pytest.mark.parametrize("seconds, wait", [(0.001, 0.05), (0.2, 2.0)])
def test_slow_pictures_are_rare(seconds: float, wait: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = 100.0, list[float]()

    def draw(_: Rendered, picture: object) -> None:
        nonlocal now
        now += seconds
        drawn.append(now)

    monkeypatch.setattr(Rendered, "_draw", draw)
    monkeypatch.setattr(markdown.time, "monotonic", lambda: now)
    rendered = Rendered(Console(file=io.StringIO()))
    for _ in range(10_000):
        rendered.write("x")
        now += 0.001
    between = [two - seconds - one for one, two in pairwise(drawn)]
    assert len(between) > 3 and all(wait <= pause < wait + 0.002 for pause in between)


@pytest.mark.parametrize(
    "text, block",
    [
        ("a\nb", ""),
        ("a\n\n", ""),
        ("a\n\nb", "a\n\n"),
        ("a\n\n  b", ""),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("~~~\n```\n\nb", ""),
        ("- a\n\n-", ""),
        ("- a\n\n- b\n\nc", "- a\n\n- b\n\n"),
        ("1. a\n\n2", ""),
        ("1. a\n\n**b", "1. a\n\n"),
        ("\n\na", ""),
    ],
)
def test_blocks(text: str, block: str) -> None:
    assert first_block(text) == (block, text[len(block) :])
