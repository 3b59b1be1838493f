"""`mlx-resonance cache`: documents read beforehand, resumed after a kill, listed and cleared."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, stream_generate
from mlx_resonance.generation import PromptCache, cache_key
from mlx_resonance.generation.messages import document_tokens, question_tokens

import pytest

from .checkpoints import source


@pytest.fixture
def documents(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.py", tmp_path / "other.py"]
    for i, path in enumerate(paths):
        path.write_text(source()[5000 * i : 5000 * i + 2500])
    return paths


def known(checkpoint: Path, folder: Path, document: Path, question: str, bits: int | None = None) -> tuple[int, int]:
    """How many tokens of a question about a document are known, and how many the document has."""
    opened = Checkpoint.open(checkpoint, factor=8.0)
    tokens = question_tokens(opened.tokenizer, [document.read_text()], question)
    kept = PromptCache(folder, cache_key(opened, bits))
    return kept.known(tokens), len(document_tokens(opened.tokenizer, [document.read_text()]))


@pytest.mark.parametrize("bits", [None, 8])
def test_the_first_question_is_as_quick_as_the_second(
    checkpoint: Path, documents: list[Path], tmp_path: Path, run: Any, bits: int | None
) -> None:
    folder = tmp_path / "kept"
    options = ["--factor", 8, "--prompt-cache", folder, *(["--kv-bits", bits] if bits else [])]
    code, out, err = run("cache", "add", "-m", checkpoint, *documents, *options, "--json")
    assert code == 0, err
    results = json.loads(out)["files"]
    for document, result in zip(documents, results, strict=True):
        found, length = known(checkpoint, folder, document, "What is it?", bits)
        assert result == {"file": str(document), "tokens": length, "new": length} and length > 500
        assert found == length
    again = json.loads(run("cache", "add", "-m", checkpoint, *documents, *options, "--json")[1])["files"]
    assert [result["new"] for result in again] == [0, 0]
    assert (bits is None) == (known(checkpoint, folder, documents[0], "What?")[0] > 0)


def test_a_question_about_a_document_read_beforehand_has_the_same_answer(
    checkpoint: Path, documents: list[Path], tmp_path: Path, run: Any
) -> None:
    run("cache", "add", "-m", checkpoint, documents[0], "--factor", 8, "--prompt-cache", tmp_path / "kept")
    opened, seen = Checkpoint.open(checkpoint, factor=8.0), []
    loaded = load(checkpoint, factor=8)
    tokens = question_tokens(loaded[1], [documents[0].read_text()], "class")
    expected = [response.token for response in stream_generate(*loaded, tokens, max_tokens=10)]
    kept = PromptCache(tmp_path / "kept", cache_key(opened, None))
    answer = stream_generate(
        *loaded, tokens, max_tokens=10, disk_cache=kept, prompt_progress_callback=lambda done, _: seen.append(done)
    )
    assert [response.token for response in answer] == expected and seen[0] > len(tokens) - 10


def test_a_chat_template_and_a_system_prompt_come_first(
    random_llama: Path, tmp_path: Path, run: Any, documents: list[Path]
) -> None:
    folder = tmp_path / "kept"
    options = ["--factor", 16, "--prompt-cache", folder, "--system-prompt", "Be brief."]
    code, _, err = run("cache", "add", "-m", random_llama, documents[0], *options)
    assert code == 0, err
    opened = Checkpoint.open(random_llama, factor=16.0)
    kept, texts = PromptCache(folder, cache_key(opened, None)), [documents[0].read_text()]
    length = len(document_tokens(opened.tokenizer, texts, "Be brief."))
    assert kept.known(question_tokens(opened.tokenizer, texts, "Why?", "Be brief.")) == length
    assert kept.known(question_tokens(opened.tokenizer, texts, "Why?")) < 10


def test_a_killed_reading_resumes_at_its_last_file(
    checkpoint: Path, documents: list[Path], tmp_path: Path, run: Any
) -> None:
    code = """
import os, signal
from mlx_resonance import cli
from mlx_resonance.cli import cache
from mlx_resonance.generation import documents
prefill, calls = documents.prefill, []
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    prefill(*arguments, **options)
documents.prefill = killed
cli.main()
"""
    folder = tmp_path / "kept"
    options = ["-m", checkpoint, documents[0], "--factor", "8", "--prompt-cache", folder, "--prefill-step-size", "32"]
    done = subprocess.run([sys.executable, "-c", code, "cache", "add", *options], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found, length = known(checkpoint, folder, documents[0], "What is it?")
    files = len(list(folder.glob("*.safetensors")))
    assert files == 2 and 200 < found < 330  # of 128 tokens or so each
    _, out, _ = run("cache", "add", *options, "--json")
    assert json.loads(out)["files"][0]["new"] == length - found
    assert known(checkpoint, folder, documents[0], "What is it?")[0] == length
    (entry,) = json.loads(run("cache", "list", "--folder", folder, "--json")[1])["entries"]
    assert entry["tokens"] == length


def test_list_and_clear(checkpoint: Path, random_llama: Path, tmp_path: Path, run: Any, documents: list[Path]) -> None:
    folder = tmp_path / "kept"
    assert run("cache", "list", "--folder", folder)[:2] == (0, f"{folder}: 0 texts, 0.0 MB\n") and not folder.exists()
    run("cache", "add", "-m", checkpoint, *documents, "--factor", 8, "--prompt-cache", folder)
    run("cache", "add", "-m", random_llama, documents[0], "--factor", 16, "--prompt-cache", folder)
    (folder / "README").write_text("mine")
    code, out, _ = run("cache", "list", "--folder", folder, "--json")
    listed = json.loads(out)
    assert code == 0 and [entry["name"] for entry in listed["entries"]] == [str(random_llama), *[str(checkpoint)] * 2]
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert listed["bytes"] == sum(sizes) == sum(entry["bytes"] for entry in listed["entries"])
    _, table, _ = run("cache", "list", "--folder", folder)
    assert table.count("\n") == 5 and table.splitlines()[-1].startswith(f"{folder}: 3 texts, ")
    code, out, _ = run("cache", "clear", "--folder", folder, "-m", random_llama, "--json")
    assert json.loads(out)["files"] == 1
    assert run("cache", "clear", "--folder", folder, "-m", "owner/none")[1].startswith("deleted 0 files")
    _, out, _ = run("cache", "clear", "--folder", folder)
    assert out.startswith("deleted 2 files, ") and str(folder) in out
    assert not list(folder.glob("*.safetensors")) and (folder / "README").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["exceed the checkpoint's context of 512", "--factor 2"]),
        (["--factor", 8, "--memory", "20MB"], ["need", "the limit is"]),
        (["--factor", 8, "--prompt-cache-size", "1MB"], ["the limit is 1.0 MB", "--prompt-cache-size"]),
        (["--factor", 8, "--system-prompt", "Be brief."], ["chat template", "--system-prompt"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    checkpoint: Path, documents: list[Path], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch,
    options: list[Any], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("loaded"))
    folder = tmp_path / "kept"
    code, out, err = run("cache", "add", "-m", checkpoint, documents[0], "--prompt-cache", folder, *options)
    assert (code, out) == (2, "") and all(word in err.splitlines()[-1] for word in words), err
    assert not folder.exists()


def test_a_document_must_be_there_and_be_text(checkpoint: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("\n")
    for name, words in (("none", "no such file"), ("binary", "not UTF-8"), ("empty", "is empty"), (".", "a folder")):
        code, out, err = run("cache", "add", "-m", checkpoint, tmp_path / name, "--prompt-cache", tmp_path / "kept")
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_a_budget_that_is_used_up_is_a_failure(
    checkpoint: Path, documents: list[Path], tmp_path: Path, run: Any
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    today = datetime.now(timezone.utc).date().isoformat()
    (folder / "written.json").write_text(json.dumps({"day": today, "bytes": 10 * 20_000_000 - 1000}))
    options = ["--factor", 8, "--prompt-cache", folder, "--prompt-cache-size", "20MB"]
    code, _, err = run("cache", "add", "-m", checkpoint, documents[0], *options)
    assert code == 1 and "budget" in err and "has only 0 of its" in err


@pytest.mark.parametrize("command", [["list"], ["clear"]])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, run: Any, command: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    code, out, err = run("cache", *command, "--folder", tmp_path / "file")
    assert (code, out) == (2, "") and "is a file: expected a folder" in err and (tmp_path / "file").exists()
