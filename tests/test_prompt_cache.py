"""The on-disk KV cache: the same text, what is reused and what never is, damage, memory, two processes at once."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import PromptCache, cache_key, prompt_folder, prompt_segments
from mlx_resonance.generation.kv_format import KVFormat

import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache

from .checkpoints import COMMAND, prompt, source


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=8)


def ask(loaded: Any, tokens: list[int], kept: PromptCache | None = None, **options: Any) -> tuple[list[int], int]:
    """The tokens of a greedy answer, and how many of the prompt were not read."""
    seen: list[int] = []
    options = {"max_tokens": 12, "prompt_progress_callback": lambda done, _: seen.append(done)} | options
    answer = [response.token for response in stream_generate(*loaded, tokens, disk_cache=kept, **options)]
    return answer, seen[0]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def files(folder: Path) -> list[Path]:
    """All but the count of bytes written."""
    return sorted(path for path in folder.iterdir() if path.name != prompt_folder.LEDGER)


@pytest.mark.parametrize("kv_bits", [None, 8, "8,4", 4])
def test_the_same_text_and_only_what_differs_is_read(loaded: Any, tmp_path: Path, kv_bits: int | str | None) -> None:
    document = prompt(loaded[1], 700)
    first, second = [document + prompt(loaded[1], 30, start=start)[1:] for start in (2000, 3000)]
    expected = [ask(loaded, tokens, kv_bits=kv_bits)[0] for tokens in (first, second, document[:300])]
    kept = PromptCache(tmp_path, "key")
    assert ask(loaded, first, kept, kv_bits=kv_bits) == (expected[0], 0)
    assert ask(loaded, first, kept, kv_bits=kv_bits) == (expected[0], len(first) - 1)
    # 700 tokens of the document, and whatever the questions share
    answer, known = ask(loaded, second, PromptCache(tmp_path, "key"), kv_bits=kv_bits)
    assert answer == expected[1] and 700 <= known < 710
    assert ask(loaded, document[:300], kept, kv_bits=kv_bits) == (expected[2], 299)


@pytest.mark.long
def test_a_second_question_on_4096_tokens_reads_the_question_only(loaded: Any, tmp_path: Path) -> None:
    document = prompt(loaded[1], 4000)
    ask(loaded, document + prompt(loaded[1], 40, start=6000)[1:], PromptCache(tmp_path, "key"), max_tokens=1)
    question = document + prompt(loaded[1], 40, start=7000)[1:]
    _, known = ask(loaded, question, PromptCache(tmp_path, "key"), max_tokens=1)
    assert 4000 <= known < 4010


def test_an_answer_is_part_of_the_next_prompt(loaded: Any, tmp_path: Path) -> None:
    """As in a chat: what is new goes into a file of its own, the one before it stays as it was."""
    tokens = prompt(loaded[1], 200)
    answer, _ = ask(loaded, tokens, PromptCache(tmp_path, "key"))
    (entry,) = entries(tmp_path)
    content = entry.read_bytes()
    longer = tokens + answer + prompt(loaded[1], 100, start=900)[1:]
    expected = ask(loaded, longer)[0]
    assert ask(loaded, longer, PromptCache(tmp_path, "key")) == (expected, len(tokens) + len(answer))
    assert len(entries(tmp_path)) == 2 and entry.read_bytes() == content
    assert ask(loaded, longer, PromptCache(tmp_path, "key")) == (expected, len(longer) - 1)
    assert len(entries(tmp_path)) == 2


def test_the_key_depends_on_model_rope_and_format(checkpoint: Path, stdlib_llama: Path, copy_of: Any) -> None:
    opened, other = Checkpoint.open(checkpoint), copy_of(checkpoint)
    same = cache_key(Checkpoint.open(other), None)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[len(content) // 2 + 12345] ^= 64  # one bit of a weight, the size not
    (other / "model.safetensors").write_bytes(content)
    keys = [cache_key(opened, bits) for bits in (None, 8, 4)]
    keys += [cache_key(opened.rescaled(factor), None) for factor in (2, 4)]
    keys += [cache_key(Checkpoint.open(folder), None) for folder in (other, stdlib_llama)]
    assert len(set(keys)) == len(keys) and same == keys[0] == cache_key(Checkpoint.open(checkpoint), None)


def test_an_entry_of_another_model_rope_or_format_is_not_used(
    checkpoint: Path, stdlib_llama: Path, tmp_path: Path, run: Any
) -> None:
    text, folder = source()[:800], tmp_path / "kept"

    def ask(model: Path, *options: object) -> Any:
        common = ["--prompt", text, "--max-tokens", 12, "--json", *options]
        code, out, err = run("generate", "--model", model, *common)
        assert code == 0, err
        expected = json.loads(out)["text"]
        before = set(entries(folder))
        code, out, err = run("generate", "--model", model, *common, "--prompt-cache", folder)
        assert code == 0 and json.loads(out)["text"] == expected and "warning" not in err.lower()
        return len(set(entries(folder)) - before)

    assert ask(checkpoint, "--factor", 4) == 1
    assert ask(checkpoint, "--factor", 8) == 1
    assert ask(checkpoint, "--factor", 8, "--kv-bits", 8) == 1
    assert ask(checkpoint, "--factor", 8, "--kv-bits", 4) == 1
    assert ask(stdlib_llama, "--factor", 8) == 1
    assert ask(checkpoint, "--factor", 8) == 0


def damaged(content: bytes, kind: str) -> bytes:
    """An entry's bytes after an accident."""
    if kind.startswith("flip"):
        at = int(float(kind.split()[1]) * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    return {
        "truncated": content[: len(content) // 2],
        "one byte short": content[:-1],
        "header only": content[:100],
        "garbage": bytes(range(256)) * 100,
        "empty": b"",
        "zeros": bytes(len(content)),
        "longer": content + b"\0",
    }[kind]


FLIPS = [f"flip {part}" for part in (0, 0.0005, 0.001, 0.002, 0.01, 0.3, 0.5, 0.999, 1)]


@pytest.mark.parametrize(
    "kind", ["truncated", "one byte short", "header only", "garbage", "empty", "zeros", "longer", *FLIPS]
)
def test_a_damaged_entry_is_dropped_with_one_warning(
    loaded: Any, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(loaded[1], 120)
    expected, _ = ask(loaded, tokens, PromptCache(tmp_path, "key"))
    (entry,) = entries(tmp_path)
    entry.write_bytes(damaged(entry.read_bytes(), kind))
    with caplog.at_level(logging.WARNING, "mlx_resonance"):
        caplog.clear()
        assert ask(loaded, tokens, PromptCache(tmp_path, "key")) == (expected, 0)
    assert len(caplog.records) == 1 and entry.name in caplog.text
    assert ask(loaded, tokens, PromptCache(tmp_path, "key")) == (expected, 119)  # written again


def test_every_bit_counts(loaded: Any, tmp_path: Path) -> None:
    """Whichever bit of an entry is flipped, the entry is not used."""
    tokens = prompt(loaded[1], 12)
    ask(loaded, tokens, PromptCache(tmp_path, "key"), max_tokens=1)
    (entry,) = entries(tmp_path)
    content = entry.read_bytes()
    for at in np.random.default_rng(0).integers(0, 8 * len(content), 150).tolist():
        entry.write_bytes(content[: at // 8] + bytes([content[at // 8] ^ (1 << at % 8)]) + content[at // 8 + 1 :])
        cache = prompt_caches(loaded)
        assert PromptCache(tmp_path, "key").fetch(tokens, cache) == 0, at
        assert all(layer.offset == 0 and layer.keys is None for layer in cache)
    entry.write_bytes(content)
    assert PromptCache(tmp_path, "key").fetch(tokens, prompt_caches(loaded)) == 11


def prompt_caches(loaded: Any) -> list[Any]:
    from mlx_resonance.generation.cache import make_cache

    return make_cache(loaded[0], 64)


def test_least_recently_used_goes_first_and_foreign_files_stay(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"x" * 10**6)
    (tmp_path / "key-notes.safetensors").write_bytes(b"")  # damaged, and not ours
    (tmp_path / "README").write_text("mine")
    foreign = set(tmp_path.iterdir())
    key = "0123456789abcdef"
    size = 100 * 2 * 5 * 2 * 64 * 4  # bytes of 100 tokens
    old = tmp_path / f"{key}-{key}{key}.safetensors"  # of a version before texts shared files
    old.write_bytes(bytes(size // 2))
    os.utime(old, (0, 0))
    documents = [prompt(loaded[1], 95, start=500 * i) for i in range(5)]
    documents = [[tokens[0], i + 10, *tokens[1:]] for i, tokens in enumerate(documents)]  # nothing shared

    def read(i: int) -> int:
        known = ask(loaded, documents[i], PromptCache(tmp_path, key, int(3.5 * size)), max_tokens=3)[1]
        time.sleep(0.02)  # for file systems that count time in steps
        return known

    for i in (0, 1, 2):
        assert read(i) == 0  # the start token alone is not worth an entry
    assert read(0) == 95  # now 1 is the least recently used
    assert old.exists()  # three texts of almost 100 tokens and this one fit
    assert read(3) == 0 and not old.exists()
    stored = [int(prompt_segments.read_segment(path).tokens[1]) for path in set(entries(tmp_path)) - foreign]
    assert sorted(stored) == [10, 12, 13]
    assert sum(path.stat().st_size for path in set(entries(tmp_path)) - foreign) <= 3.5 * size
    assert read(4) == 0
    stored = [int(prompt_segments.read_segment(path).tokens[1]) for path in set(entries(tmp_path)) - foreign]
    assert sorted(stored) == [10, 13, 14]
    assert foreign <= set(tmp_path.iterdir())


def test_an_entry_larger_than_all_is_not_written(loaded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = prompt(loaded[1], 100)
    ask(loaded, tokens, PromptCache(tmp_path, "key", 1000))
    assert not list(tmp_path.iterdir()) and "an entry of" in caplog.text and "exceeds its limit of 1000" in caplog.text


@pytest.mark.parametrize("place", ["save", "replace"])
def test_a_full_disk_is_a_warning(
    loaded: Any, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(loaded[1], 100)
    expected, _ = ask(loaded, tokens)

    def full(*_: object) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "no space left")

    def refused(*_: object) -> None:
        raise PermissionError("not here")

    if place == "save":
        monkeypatch.setattr(prompt_segments, "_blocks", full)
    else:
        monkeypatch.setattr(Path, "replace", refused)
    assert ask(loaded, tokens, PromptCache(tmp_path, "key")) == (expected, 0)
    assert "cannot be written" in caplog.text and files(tmp_path) == []


def test_a_folder_that_disappears_is_not_an_error(
    loaded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(loaded[1], 60)
    kept = PromptCache(tmp_path / "kept", "key")
    (tmp_path / "kept").rmdir()
    assert ask(loaded, tokens, kept) == (ask(loaded, tokens)[0], 0)
    assert "cannot be written" in caplog.text


CHILD = """
import random, sys
from pathlib import Path
from mlx_resonance import load, stream_generate
from mlx_resonance.generation import PromptCache
import logging, mlx.core as mx
logging.basicConfig(level=logging.WARNING)
model, tokenizer = load(sys.argv[1])
folder, seed = Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
answers = {}
for _ in range(60):
    kind, length = chance.randrange(3), chance.randrange(8, 60)
    tokens = [0] + [100 * kind + i for i in range(10, 10 + length)]
    kept = PromptCache(folder, "0123456789abcdef", 500_000)
    answer = [r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=3, disk_cache=kept)]
    assert answers.setdefault((kind, length), answer) == answer, (kind, length)
print(len(answers))
"""


def test_two_processes_share_a_folder(random_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, random_llama, tmp_path / "kept"]
    processes = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (1, 2, 3)
    ]
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and int(out) > 20, err
        assert "damaged" not in err and "cannot be written" not in err, err
    kept = files(tmp_path / "kept")
    assert kept and not [path for path in kept if path.name.startswith(".")]
    assert sum(path.stat().st_size for path in kept) <= 500_000


def test_killed_while_writing_leaves_a_file_that_is_deleted_later(
    checkpoint: Path, loaded: Any, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
from mlx_resonance import cli
from mlx_resonance.generation import prompt_segments
blocks = prompt_segments._blocks
def half(*arguments):
    for i, block in enumerate(blocks(*arguments)):
        yield block
        half.written += 1
        if half.written == 7:
            os.kill(os.getpid(), signal.SIGKILL)
half.written = 0
prompt_segments._blocks = half
cli.main()
"""
    command = [sys.executable, "-c", code, *COMMAND[1:], "--model", checkpoint, "--prompt", "import os\n" * 20]
    folder = tmp_path / "kept"
    done = subprocess.run([*command, "--max-tokens", "2", "--prompt-cache", folder], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (left,) = files(folder)
    assert left.name.startswith(".")
    tokens = prompt(loaded[1], 50)
    ask(loaded, tokens, PromptCache(folder, "key"))
    assert left.exists()  # another process may be writing it
    os.utime(left, (0, time.time() - 2 * prompt_folder.STALE))
    ask(loaded, prompt(loaded[1], 50, start=700), PromptCache(folder, "key"))
    assert not left.exists() and len(entries(folder)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-cache-size", "many"], "--prompt-cache-size': it must be a size"),
        (["--prompt-cache-size", "0GB"], "--prompt-cache-size': it must be a size"),
    ],
)
def test_wrong_options_are_one_line(
    random_llama: Path, tmp_path: Path, run: Any, options: list[str], message: str
) -> None:
    common = ["--model", random_llama, "--prompt", "import os", "--max-tokens", 2]
    code, out, err = run("generate", *common, "--prompt-cache", tmp_path / "kept", *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


def test_a_file_in_the_place_of_the_folder_is_refused(random_llama: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "file").write_text("mine")
    common = ["--model", random_llama, "--prompt", "import os", "--max-tokens", 2]
    code, out, err = run("generate", *common, "--prompt-cache", tmp_path / "file")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "is a file: expected a folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_layer_with_a_window_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sliding window"):
        PromptCache(tmp_path, "0" * 16).fetch([1, 2, 3], [RotatingKVCache(8)])


def test_rotated_keys_never_come_from_the_key_of_others(loaded: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Their arrays have the types and shapes of those that are not rotated."""
    opened = Checkpoint.open(checkpoint).rescaled(8)
    tokens = prompt(loaded[1], 300)
    plain, rotated = (PromptCache(tmp_path, cache_key(opened, 4, kv_rotate=rotate)) for rotate in (False, True))
    assert rotated.key == cache_key(opened, KVFormat.of(4, True)) != plain.key
    for kept, rotate in ((rotated, True), (plain, False)):
        expected = ask(loaded, tokens, kv_bits=4, kv_rotate=rotate)[0]
        assert ask(loaded, tokens, kept, kv_bits=4, kv_rotate=rotate) == (expected, 0)
        assert ask(loaded, tokens, kept, kv_bits=4, kv_rotate=rotate) == (expected, 299)
        before = entries(tmp_path)
        with pytest.raises(UsageError, match="the key of this prompt cache is for another KV format"):
            ask(loaded, tokens, kept, kv_bits=4, kv_rotate=not rotate)
        assert entries(tmp_path) == before


def test_keys_of_adapters_are_their_own(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    keys = [cache_key(opened, None)]
    for content in (b"one", b"two"):
        (tmp_path / "adapters.safetensors").write_bytes(content)
        (tmp_path / "adapter_config.json").write_text("{}")
        keys += [cache_key(opened, None, adapter_path=tmp_path), cache_key(opened, 4, adapter_path=tmp_path)]
    assert len(set(keys)) == 5
