"""What could be wrong in `benchmarks/` without anyone noticing: the texts of documents, prompts that share a start."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.errors import UsageError

import mlx.core as mx
import numpy as np
import pytest

POD = """=encoding utf8

=head1 NAME

perlx - I<about> B<< a<=>b >>

Operators such as C<< $a <=> $b >>, E<lt>, S<C<< x >> y>X<entry>; see L<the list|perlop/"x"> and L</[8]>.

 my $code = "B<as it is>";

	tabbed

=over 4

=item  C<m//>

Matches.

=back

=begin html

<p>hidden</p>

=end html

=cut
"""
HTML = """<html><head><title>hidden</title></head><body>
<div class="navheader"><div>hidden</div><img src="x"><br/>hidden</div>
<h1><a id="x"/>Title</h1><p>Two
  lines &amp; an <code>entity</code>.</p><pre>  $ ls
    a  b
</pre><ul class="toc"><li>hidden</li></ul><table><tr><td>one</td><td>two</td></tr></table>end</body></html>"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by their names."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def documents(benchmarks: None) -> ModuleType:
    """`benchmarks/documents.py`."""
    import documents

    return documents


@pytest.fixture
def needle(benchmarks: None) -> ModuleType:
    """`benchmarks/needle.py`."""
    import needle

    return needle


def test_pod_becomes_text(documents: ModuleType) -> None:
    """As pod2text prints it, less the line breaks."""
    assert documents.pod_text(POD).split("\n\n") == [
        "NAME",
        "perlx - about a<=>b",
        "Operators such as $a <=> $b, <, x y; see the list and [8].",
        ' my $code = "B<as it is>";',
        "\ttabbed",
        "m//",
        "Matches.\n",
    ]


def test_html_becomes_text(documents: ModuleType) -> None:
    """Paragraphs without navigation; code keeps its spaces."""
    assert documents.html_text(HTML).split("\n\n") == [
        "Title", "Two lines & an entity.", "  $ ls\n    a  b", "one two", "end\n",
    ]  # fmt: skip


def test_a_book_has_its_pages_in_the_order_of_its_index(documents: ModuleType, tmp_path: Path) -> None:
    """Each once, the index left out."""
    links = "".join(
        f'<a href="{link}">' for link in ("index.html", "b.html", "b.html#part", "a.html", "https://x/c.html")
    )
    for name, text in (("index", links), ("a", "<p>first letter</p>"), ("b", "<p>second letter</p>")):
        (tmp_path / f"{name}.html").write_text(text)
    assert documents.read(tmp_path / "index.html") == "second letter\n\n\nfirst letter\n"


def test_texts_that_are_there_are_not_fetched(
    documents: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is that of the list; without apt-get, a missing one is an error that names it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in documents.SOURCES:
        (tmp_path / f"{name}.txt").write_text(name)
    assert documents.documents(tmp_path) == [(name, name) for name in documents.SOURCES]
    (tmp_path / "git-manual.txt").unlink()
    with pytest.raises(UsageError, match=r"git-manual comes from Debian's package git-doc, and there is no apt-get"):
        documents.documents(tmp_path)


def test_a_prompt_has_the_sentence_between_paragraphs(needle: ModuleType, checkpoint: Path) -> None:
    """At the beginning, in the middle and at the end of the text, or nowhere; the longest shared text comes first."""
    prompts = needle.Prompts(Checkpoint.open(checkpoint), "\n\n".join(f"Paragraph {i} of the text." for i in range(99)))
    trials = prompts.trials([300, 500], [0, 50, 100], 0)
    assert [trial.at for trial in trials] == sorted((trial.at for trial in trials), reverse=True)
    for trial in trials:
        before, after = (
            prompts.tokenizer.decode(part) for part in (prompts.text[: trial.at], prompts.text[trial.at : trial.end])
        )
        assert all(part.startswith("Paragraph") and part.endswith(".\n\n") for part in (before, after) if part)
        around = len(prompts.head) + len(prompts.sentence(0)) + len(prompts.question(0)) + needle.ANSWER_TOKENS
        assert trial.length - 30 < trial.end + around <= trial.length
        assert trial.depth == "none" or abs(trial.at - trial.depth / 100 * trial.end) < 10
    assert prompts.head == [prompts.tokenizer.bos_token_id]
    assert "Lisbon is 7421.\n\n" in prompts.tokenizer.decode(prompts.sentence(0))


def test_a_shared_beginning_does_not_change_an_answer(needle: ModuleType, checkpoint: Path) -> None:
    """Going back and reading on is as good as reading anew."""
    model = Checkpoint.open(checkpoint).load()
    first, other, last = ([int(token) for token in np.random.default_rng(i).integers(10, 2000, 60)] for i in range(3))
    reader = needle.Reader(model, 200)
    reader.read(first + other)
    reader.answer(reader.read(other), 5, set())
    reader.likelihood(other[:7], other[7:9])
    reader.back(len(first))
    shared = reader.read(last)
    logits = model(mx.array([first + last]))[0, -1]
    assert np.abs(np.array(shared - (logits - mx.logsumexp(logits)))).max() < 1e-4
    whole = model(mx.array([first + last + other[:9]]))[0]
    whole = whole - mx.logsumexp(whole, axis=-1, keepdims=True)
    expected = (whole[126, other[7]] + whole[127, other[8]]).item() / 2
    assert reader.likelihood(other[:7], other[7:9]) == pytest.approx(expected, abs=1e-4)


def test_a_prompt_follows_the_chat_template(needle: ModuleType, checkpoint: Path, copy_of: Any) -> None:
    """Made of pieces, it has the text of a whole message."""
    folder = copy_of(checkpoint)
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} [end]\n{% endfor %}[answer] "
    )
    (folder / "chat_template.jinja").write_text(template)
    prompts = needle.Prompts(Checkpoint.open(folder), "One.\n\nTwo.")
    question = needle.QUESTION.format(city=needle.NEEDLES[1][0])
    tokens = prompts.head + prompts.text[: prompts.breaks[1]] + prompts.sentence(1) + prompts.text[prompts.breaks[1] :]
    text = prompts.tokenizer.decode(tokens + prompts.question(1))
    content = f"One.\n\nThe magic number of the city of Oslo is 5836.\n\nTwo.\n\n{question}"
    messages = [{"role": "user", "content": content}]
    assert text == prompts.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
