"""What could be wrong in `benchmarks/` without anyone noticing: the texts of documents, prompts that share a start.

And what the first person with a Mac would trip over in `mac.py`.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
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


MAC = Path(__file__).parents[1] / "benchmarks" / "mac.py"
CRASHES = """
import json, os, sys
_, results, _, _, *names = sys.argv
for name in names:
    if name == "rotation" and names[0] == "kernel":
        print("terminating: [METAL] Command buffer execution failed", file=sys.stderr, flush=True)
        os.abort()
    if name == "memory":
        raise SystemExit(1)
    with open(results, "a") as file:
        file.write(json.dumps({"section": name, "state": "measured", "reason": "", "rows": []}) + "\\n")
"""


@pytest.fixture
def mac(benchmarks: None) -> ModuleType:
    """`benchmarks/mac.py`."""
    import mac

    return mac


@pytest.fixture
def sections(benchmarks: None) -> ModuleType:
    """`benchmarks/mac_sections.py`."""
    import mac_sections

    return mac_sections


def test_a_mac_is_measured(mac: ModuleType, tmp_path: Path) -> None:
    """In the smallest sizes, on whatever this is: every section has rows, and nothing private is printed."""
    command = [sys.executable, str(MAC), "--quick", "--minutes", "30", "--output", str(tmp_path / "mac.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    report = json.loads(line)
    assert report == json.loads((tmp_path / "mac.json").read_text())
    assert report.keys() == {
        "chip", "architecture", "device", "memory_gb", "system", "python", "mlx", "mlx_lm", "mlx_resonance", "commit",
        "sizes", "minutes", "seconds", "sections",
    }  # fmt: skip
    assert [section["section"] for section in report["sections"]] == list(mac.SECTIONS)
    assert all(section["state"] == "measured" and section["rows"] for section in report["sections"])
    rows = {row["measured"]: row for section in report["sections"] for row in section["rows"]}
    assert rows["error of cos and sin at 10,000,019"]["ours"] <= 2.5e-7
    assert "greedy tokens that agree: 6 of 6" in rows["decode after 96 tokens"]["remarks"]
    assert rows["KV 8 bit, per token"]["ratio"] == pytest.approx(
        (8 + 2 * 16 / 32) / 32, abs=1e-3
    )  # scales of groups of 32
    assert table[0] == f"| {' | '.join(mac.COLUMNS)} |" and len(table) >= 2 + len(rows)
    assert {text.count(" | ") for text in table} == {len(mac.COLUMNS) - 1}
    private = {str(Path.home()), str(tmp_path), platform.node(), sys.prefix, str(MAC.parent)} - {"", "/"}
    assert [text for text in private if text in done.stdout] == []


def test_the_page_of_measurements_takes_the_rows(mac: ModuleType) -> None:
    text = (MAC.parents[1] / "docs" / "measurements.md").read_text(encoding="utf-8")
    _, results = text.split("### Results by chip\n")
    assert mac.markdown(mac.COLUMNS, []) in results.split("\n## ")[0]


def test_a_crash_loses_one_section(mac: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process that ends by itself, without a result, would do so again: it is not started again."""
    script, results = tmp_path / "crashes.py", tmp_path / "results.jsonl"
    script.write_text(CRASHES)
    names = ["kernel", "rotation", "speed", "memory", "long_prompt"]
    found = list(mac.measure([sys.executable, str(script), str(results)], names, 60, results))
    assert [(section["section"], section["state"]) for section in found] == [
        ("kernel", "measured"), ("rotation", "failed"), ("speed", "measured"), ("memory", "failed"),
        ("long_prompt", "failed"),
    ]  # fmt: skip
    crash = "the process ended with SIGABRT: terminating: [METAL] Command buffer execution failed"
    assert found[1]["reason"] == crash and found[4]["reason"] == "the process ended with exit code 1"
    assert "[METAL]" in capfd.readouterr().err


def test_a_section_that_hangs_is_stopped(mac: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac, "GRACE", 0.2)
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(600)")
    [found] = mac.measure([sys.executable, str(script)], ["kernel"], 0, tmp_path / "results.jsonl")
    assert found["state"] == "failed" and "without a result" in found["reason"]


def test_a_fault_in_a_section_is_a_row_and_exit_code_1(
    mac: ModuleType, sections: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The rows before it stay, and its own words are printed, less what is private."""
    monkeypatch.setenv("HOME", "/Users/Anna Smith")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.setattr(platform, "node", lambda: "annas-mac.local")
    secret = "/Users/Anna Smith/models of anna | annas-mac, annas-mac.local"

    def broken(bench: Any) -> Any:
        yield mac.Row("before", 1.5, "ms")
        raise RuntimeError(f"no kernel\nin {secret}, {tmp_path}/x.metal")

    monkeypatch.setattr(sections, "rotation", broken)
    bench = sections.Bench(sections.SIZES["quick"], tmp_path, None, 60)
    found = [{"section": name} | sections.measure(name, bench) for name in ("rotation", "angles", "speed")]
    monkeypatch.setattr(mac, "measure", lambda *_: iter(found))
    monkeypatch.setattr(sys, "argv", ["mac.py", "--quick"])
    with pytest.raises(SystemExit) as done:
        mac.main()
    out = capsys.readouterr().out
    assert done.value.code == 1
    assert "| before | 1.5 ms |  |  |  |" in out and "| error of cos and sin at 131,071 | " in out
    assert "| speed: skipped |  |  |  | there is no model |" in out
    fault = next(line for line in out.splitlines() if "| rotation: failed |" in line)
    assert fault.split(" | ")[-1] == "RuntimeError: no kernel in …/models of … ¦ …, …, …/x.metal |"
    assert "nna" not in out and str(tmp_path) not in out


def test_what_is_not_private_stays(mac: ModuleType) -> None:
    for text in ("12 tokens/s", "ours / other", "24.1 ms, mlx-lm's YarnRoPE", "[ResonanceRoPE] off by 1e-3 in float16"):
        assert mac.anonymous([{"remarks": text}]) == [{"remarks": text}]


def test_no_section_starts_when_the_time_is_over(sections: ModuleType, tmp_path: Path) -> None:
    found = sections.measure("angles", sections.Bench(sections.SIZES["quick"], tmp_path, None, -1))
    assert (found["state"], found["reason"], found["rows"]) == ("skipped", "the time is over", [])


def test_a_long_prompt_without_time_is_left_out(sections: ModuleType, tmp_path: Path, checkpoint: Path) -> None:
    bench = sections.Bench(sections.SIZES["quick"], tmp_path, checkpoint, 60)
    sections.measure("model", bench)
    bench.deadline = bench.deadline - 60 + 1e-3
    with pytest.raises(sections.Skip, match=r"200 tokens would take more than \d+ s"):
        list(sections.long_prompt(bench))


def test_both_sides_have_the_angles_of_a_rounded_checkpoint_before_it_was_rounded(
    sections: ModuleType, tmp_path: Path, extended: Path
) -> None:
    """mlx-lm's own model refuses rounded wavelengths; the comparison is of the same angles, weights and tokens."""
    from mlx_lm.models.rope_utils import YarnRoPE

    bench = sections.Bench(sections.SIZES["quick"], tmp_path, extended, 60)
    assert type(bench.stock.layers[0].self_attn.rope) is YarnRoPE and bench.checkpoint.rope.rope_type == "yarn"
    *_, decode = sections.compare(bench, 700, 1, False)
    assert "greedy tokens that agree: 6 of 6" in decode.remarks


def test_a_quantized_random_model_in_16_bits(sections: ModuleType, tmp_path: Path) -> None:
    """As on a GPU, in small."""
    from dataclasses import replace

    bench = sections.Bench(replace(sections.SIZES["quick"], q_bits=4, dtype=mx.float16), tmp_path, None, 60)
    [row] = sections.model(bench)
    assert bench.stock.layers[0].mlp.up_proj.bits == 4 and "random weights" in row.remarks
    assert bench.stock_answer(20, 3).tokens == bench.answer(20, 3).tokens


def test_what_a_decode_step_costs(benchmarks: None) -> None:
    """No times: the same tokens, one launch per layer where mlx-lm's rotation has two, and all names of the report."""
    command = [sys.executable, "benchmarks/dispatch.py", "--rounds", "2", "--layers", "3"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["same_greedy_tokens"] and report["ratio_to_mlx_lm"]["mlx_lm"] == 1
    launches = {name: graph["launches_of_the_rotation"] for name, graph in report["graphs"].items()}
    assert launches == {"ours": 3, "mlx_lm": 6, "mlx_lm_yarn": 12}
    assert report["us_per_layer"].keys() == {"ours", "ours_transformable", "mlx_lm", "mlx_lm_yarn"}
