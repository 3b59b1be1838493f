"""`eval perplexity` as a command: files of documents, what is refused, and what is left behind."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, plan_memory, run_log
from mlx_resonance.errors import UsageError
from mlx_resonance.evaluation.texts import read_documents
from mlx_resonance.generation.memory import usable

import pyarrow
import pytest
from pyarrow import parquet

from .checkpoints import source


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of documents, good and bad ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.py").write_text(source()[:1500])
    (folder / "short.txt").write_text("def f(): pass")
    lines = [{"text": source()[:900], "n": 1}, {"text": "x = 1\n"}, {"text": source()[3000:4000]}]
    (folder / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (folder / "empty.txt").write_text("")
    (folder / "bytes.txt").write_bytes(b"caf\xe9")
    (folder / "x.csv").write_text("text\na")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "digits.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n")
    (folder / "bytes.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (folder / "t.parquet").write_bytes(b"PAR1")
    return folder


def test_command(run: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    output, figure = tmp_path / "out" / "lines.jsonl", tmp_path / "curve.svg"
    both = ("eval", "perplexity", "--data", data / "b.jsonl", "--data", data / "a.py", "--output", output)
    common = (*both, "--contexts", "64,200", "--truncate", "--last", "50")
    ropes = ("--rope", "default,resonance_yarn", "--factor", "4")
    code, out, err = run(*common, "--model", checkpoint, *ropes, "--plot", figure, "--json")
    result = json.loads(out)
    assert code == 0 and "3 documents of at least 199 tokens, 1 shorter ones left out" in err
    assert [(row["rope"], row["context"]) for row in result["results"]] == [
        (rope, context) for rope in ("default", "resonance_yarn") for context in (64, 200)
    ]
    assert {row["tokens"] for row in result["results"]} == {3 * 63, 3 * 199} and result["last"] == 50
    assert (result["context"], result["truncation"], result["chat_template"]) == ([64, 200], "end", False)
    assert result["version"]["mlx"] and result["rope"] == ["default", "resonance_yarn"] and "evaluator" in result
    assert "last 50" not in err  # both windows have as many
    assert 2 < result["results"][1]["perplexity_last"] < 500 and figure.read_bytes().startswith(b"<?xml")
    before = output.read_bytes()
    code, out, _ = run(*common, "--model", checkpoint, *ropes, "--documents", "1")
    assert code == 0 and "resonance_yarn" in out and "last 50" in out and output.read_bytes() == before
    assert run(*common, "--model", checkpoint, "--rope", "default", "--stride", "9")[0] == 0  # means nothing here
    other = (*both[:6], "--output", tmp_path / "other.jsonl", "--contexts", "64,200", "--truncate", "--last", 100)
    code, out, err = run(*other, "--model", checkpoint, "--evaluator", checkpoint)
    assert code == 0 and "last 100: windows have fewer tokens to score (63)" in err and "key tokens" in out
    code, _, err = run(*both, "--model", checkpoint, "--contexts", "64", "--stride", "40")
    assert code == 2 and "truncate is true there and false here" in err and "another --output" in err


def test_beyond(run: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    common = ("eval", "perplexity", "--model", checkpoint, "--data", data / "short.txt", "--contexts", "600")
    code, out, err = run(*common, "--output", tmp_path / "x.jsonl")
    assert (
        (code, out, len(err.splitlines())) == (2, "", 1)
        and "--rope resonance_yarn --factor 2 (which" in err
        and err.endswith("or --beyond\n")
    )
    code, out, _ = run(*common, "--output", tmp_path / "x.jsonl", "--beyond", "--json")
    assert code == 0 and json.loads(out)["results"][0]["windows"] == 1
    assert run(*common, "--output", tmp_path / "x.jsonl", "--rope", "yarn", "--factor", "2")[0] == 0


BAD = {
    "": "Missing option '--data'",
    "--data none.txt": "none.txt: no such file (--data)",
    "--data empty.txt": "empty.txt is empty (--data)",
    "--data bytes.txt": "bytes.txt is not UTF-8 text",
    "--data digits.jsonl": "digits.jsonl, line 1 is not JSON",
    "--data x.csv": "x.csv: the suffix must be one of .txt",
    "--data broken.jsonl": "broken.jsonl, line 2 is not JSON",
    "--data bytes.jsonl": "bytes.jsonl, line 2 is not UTF-8 text",
    "--data surrogate.jsonl": "surrogate.jsonl, line 1 has no 'text' that is a string (--field)",
    "--data b.jsonl --field n": "b.jsonl, line 1 has no 'n' that is a string (--field)",
    "--data t.parquet": "t.parquet needs pyarrow, which is not installed",
    "--data a.py --documents 0": "Invalid value for '--documents'",
    "--data short.txt --min-tokens 100": "none of 1 documents has 100 tokens, the longest has 4: give another --min-",
    "--data short.txt --truncate": "none of 1 documents has 299 tokens",
    "--data a.py --contexts 1": "contexts must be in [2, 2**31] tokens, got [1] (--contexts)",
    "--data a.py --contexts 64,3000000000": "contexts must be in [2, 2**31] tokens",
    "--data a.py --contexts x": "'--contexts': expected integers separated by commas",
    "--data a.py --contexts 256": "stride must be in [1, 255]",
    "--data a.py --stride 0": "Invalid value for '--stride'",
    "--data a.py --truncate --last 0": "Invalid value for '--last'",
    "--data a.py --rope yarn": "the scaling yarn needs a factor: give --factor",
    "--data a.py --rope yarm --factor 2": "rope must be one of default, linear",
    "--data a.py --batch-size 0": "Invalid value for '--batch-size'",
    "--data a.py --prefill-step-size 0": "Invalid value for '--prefill-step-size'",
    "--data a.py --kv-bits 3": "'--kv-bits': '3' is not one of 8, 4",
    "--data a.py --memory 1MB": "the limit is",
    "--data a.py --plot x.abc": "suffix must be one of",
    "--data a.py --evaluator none": "none",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input(
    run: Any, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(data)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    contexts = () if "--contexts" in arguments else ("--contexts", "300")
    output = tmp_path / "x.jsonl"
    code, out, err = run("eval", "perplexity", "--model", checkpoint, "--output", output, *contexts, *arguments.split())
    assert (code, out) == (2, "") and BAD[arguments] in err and len(err.splitlines()) == 1
    assert not output.exists()


def test_a_full_disk(run: Any, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_log.RunLog, "append", full)
    code, out, err = run(
        "eval", "perplexity", "--model", checkpoint, "--data", data / "short.txt", "--contexts", "4", "--stride", "2",
        "--output", tmp_path / "x.jsonl",
    )  # fmt: skip
    assert (code, out) == (1, "") and "No space left" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("name", "value"), [("digest", [1]), ("nll", None), ("tokens", "x"), ("last_nll", 1)])
def test_output_with_a_wrong_line(
    run: Any, checkpoint: Path, data: Path, tmp_path: Path, name: str, value: Any
) -> None:
    output = tmp_path / "x.jsonl"
    common = ("eval", "perplexity", "--model", checkpoint, "--data", data / "short.txt", "--output", output)
    assert run(*common, "--contexts", "4", "--truncate")[0] == 0
    header, line = output.read_text().splitlines()
    output.write_text(header + "\n" + json.dumps(json.loads(line) | {name: value}) + "\n")
    code, out, err = run(*common, "--contexts", "4", "--truncate")
    assert (code, out) == (2, "") and f"x.jsonl, line 2 has no {name!r} that is" in err and len(err.splitlines()) == 1


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": [*map(str, range(40)), None], "n": list(range(41))}), path)
    texts = read_documents([path], "text")
    assert [next(texts) for _ in range(40)] == list(map(str, range(40)))
    with pytest.raises(UsageError, match=r"row 41 has no 'text'"):
        next(texts)
    with pytest.raises(UsageError, match=r"no column 'x'; its columns are text, n"):
        list(read_documents([path], "x"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="is not a whole parquet file"):
        list(read_documents([path], "text"))


@pytest.mark.parametrize("ropes", ["resonance_yarn,default", "default,resonance_yarn"])
def test_the_memory_of_every_rope_is_planned(run: Any, stdlib_llama: Path, tmp_path: Path, ropes: str) -> None:
    """A position map, which a rope with so long a context does not need, keeps keys twice."""
    (tmp_path / "a.txt").write_text("import os\n" * 10000)
    mapped = plan_memory(Checkpoint.open(stdlib_llama).extended("dynamic", 4096), 4096).total
    plain = plan_memory(Checkpoint.open(stdlib_llama, factor=8), 4096).total
    assert plain < mapped
    memory = (plain + mapped) // 2 + 4 * 10**9 - usable(4 * 10**9)
    options = ("--rope", ropes, "--factor", 8, "--extend", "dynamic", "--contexts", 4096, "--truncate")
    options += ("--memory", f"{memory / 10**6:.3f}MB", "--output", tmp_path / "x.jsonl")
    code, out, err = run("eval", "perplexity", "-m", stdlib_llama, "--data", tmp_path / "a.txt", *options)
    assert (code, out) == (2, "") and "the limit is" in err
