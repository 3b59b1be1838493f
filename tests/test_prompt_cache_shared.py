"""The files of the on-disk KV cache: what texts share, what is written and evicted, memory, files of someone else."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, load, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import PromptCache, cache_key, prompt_cache, prompt_segments
from mlx_resonance.generation.prompt_cache import clear, default_folder, entries

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from .checkpoints import prompt
from .random_models import make

KEY = "0123456789abcdef"
LAYERS, HEADS, DIMS = 3, 2, 32
TOKEN = LAYERS * HEADS * DIMS * 2 * 4  # bytes of keys and values
HEADER = 3000  # bytes, or more for many tokens


def caches(bits: int | None = None, step: int = 256, layers: int = LAYERS) -> list[Any]:
    made: list[Any] = [KVCache() for _ in range(layers)]
    made = [cache.to_quantized(32, bits) for cache in made] if bits else made
    for cache in made:
        cache.step = step
    return made


def read(tokens: list[int]) -> list[Any]:
    """Caches as after reading a text: what they hold of a token depends on it and its position only."""
    made = caches(step=len(tokens))
    text = np.array(tokens, np.float32)[:, None] + np.arange(len(tokens), dtype=np.float32)[:, None] / 1024
    for i, cache in enumerate(made):
        keys = np.stack([text * (1 + i + head) + np.arange(DIMS) for head in range(HEADS)])[None]
        cache.update_and_fetch(mx.array(keys, mx.float32), mx.array(-keys, mx.float32))
    return made


def store(folder: Path, tokens: list[int], **options: Any) -> int:
    """Store a text. Returns how many bytes of files are new."""
    before = {path: path.stat().st_size for path in folder.glob("*.safetensors")}
    PromptCache(folder, KEY, **options).store(tokens, read(tokens))
    after = {path: path.stat().st_size for path in folder.glob("*.safetensors")}
    return sum(size for path, size in after.items() if path not in before)


def stored(folder: Path, tokens: list[int]) -> Path:
    """Store a text. Returns the one file that is new."""
    before = files(folder)
    store(folder, tokens)
    [new] = set(files(folder)) - set(before)
    return new


def fetch(folder: Path, tokens: list[int], **options: Any) -> int:
    """Fetch a prompt, and check what the caches then hold. Returns the number of its tokens."""
    found, expected = caches(step=len(tokens) + 5), read(tokens)
    kept = PromptCache(folder, KEY, **options)
    foreseen = kept.known(tokens)
    known = kept.fetch(tokens, found)
    assert known <= foreseen
    for cache, right in zip(found, expected, strict=True):
        assert cache.offset == known
        if known:
            assert cache.keys.shape[2] == len(tokens) + 5  # allocated for all
            assert mx.array_equal(cache.keys[:, :, :known], right.keys[:, :, :known])
            assert mx.array_equal(cache.values[:, :, :known], right.values[:, :, :known])
    return known


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def text(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def test_a_continuation_writes_its_new_tokens_only(tmp_path: Path) -> None:
    tokens: list[int] = []
    for part in range(5):
        tokens = tokens + text(1000 * part, 100)
        written = store(tmp_path, tokens)
        assert 100 * TOKEN < written < 100 * TOKEN + HEADER
    assert len(files(tmp_path)) == 5 and fetch(tmp_path, [*tokens, 7]) == 500
    assert fetch(tmp_path, tokens) == 499 and fetch(tmp_path, [*tokens[:250], 7, 8]) == 250
    assert store(tmp_path, tokens) == 0
    # Tokens that are the same after others that are not
    assert fetch(tmp_path, [*tokens[:50], *[7] * 50, *tokens[100:]]) == 50


def test_documents_that_begin_alike_share_the_file_of_the_beginning(tmp_path: Path) -> None:
    system, one, other = text(0, 200), text(1000, 100), text(5000, 150)
    assert store(tmp_path, system + one) > 300 * TOKEN
    assert 150 * TOKEN < store(tmp_path, system + other) < 150 * TOKEN + HEADER
    assert 60 * TOKEN < store(tmp_path, system + other[:90] + text(7000, 60)) < 60 * TOKEN + HEADER
    assert fetch(tmp_path, [*system, *one, 7]) == 300
    assert fetch(tmp_path, [*system, *other, 7]) == 350
    assert fetch(tmp_path, [*system, *other[:90], *text(7000, 60), 7]) == 350
    assert fetch(tmp_path, [*system, *other[:40], 7]) == 240


def test_a_start_token_in_common_is_not_worth_a_file(tmp_path: Path) -> None:
    store(tmp_path, [1, *text(10, 99)])
    assert fetch(tmp_path, [1, 2, *text(500, 98)]) == 0
    assert store(tmp_path, [1, 2, *text(500, 98)]) > 100 * TOKEN  # a text of its own
    assert fetch(tmp_path, [1, *text(10, 6), 2]) == 7  # 7 of 100 are a 16th


def test_a_handful_of_new_tokens_is_not_written(tmp_path: Path) -> None:
    document = text(0, 320)
    store(tmp_path, document)
    assert store(tmp_path, document + text(1000, 20)) == 0  # a 16th
    assert store(tmp_path, document + text(1000, 21)) > 0
    assert store(tmp_path, document + text(2000, 99), least=100) == 0
    assert store(tmp_path, document + text(2000, 100), least=100) > 0
    assert store(tmp_path / "new", text(0, 99), least=100) == 0
    kept = PromptCache(tmp_path, KEY, least=100)
    kept.store(document + text(3000, 1), read(document + text(3000, 1)), least=1)
    assert fetch(tmp_path, document + text(3000, 1) + [7]) == 321


def test_1025_new_tokens_are_never_a_handful(tmp_path: Path) -> None:
    document = [i % 50 for i in range(20000)]
    store(tmp_path, document)
    assert store(tmp_path, document + text(1000, 1024)) == 0
    assert store(tmp_path, document + text(1000, 1025)) > 1025 * TOKEN


def test_a_second_question_on_a_document_writes_no_document(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load(checkpoint, factor=8)
    document = prompt(loaded[1], 1000)
    questions = [document + prompt(loaded[1], 100, start=start)[1:] for start in (2000, 3000)]
    sizes = []
    for question in questions:
        list(stream_generate(*loaded, question, max_tokens=5, disk_cache=PromptCache(tmp_path, KEY)))
        sizes.append(sum(path.stat().st_size for path in files(tmp_path)))
    per_token = 2 * 5 * 2 * 64 * 4
    assert 1000 * per_token < sizes[0] and 90 * per_token < sizes[1] - sizes[0] < 110 * per_token
    assert json.loads((tmp_path / "written.json").read_text())["bytes"] == sizes[1]


def test_a_segment_without_its_parent_is_removed(tmp_path: Path) -> None:
    tokens = text(0, 100)
    first = stored(tmp_path, tokens)
    store(tmp_path, tokens + text(500, 100))
    store(tmp_path, tokens + text(500, 100) + text(900, 100))
    first.unlink()
    assert fetch(tmp_path, tokens + text(500, 200)) == 0
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", ["header", "data", "short"])
def test_after_damage_the_caches_hold_what_came_before_it(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = text(0, 100)
    stored(tmp_path, tokens)
    second = stored(tmp_path, tokens + text(500, 100))
    tokens += text(500, 100) + text(900, 100)
    third = stored(tmp_path, tokens)
    content = bytearray(second.read_bytes())
    content[200 if damage == "header" else -200] ^= 1
    second.write_bytes(content[:-1] if damage == "short" else content)
    with caplog.at_level(logging.WARNING, "mlx_resonance"):
        assert fetch(tmp_path, tokens) == 100
    (warning,) = caplog.records
    assert second.name in warning.getMessage() and "damaged" in warning.getMessage()
    assert not second.exists() and fetch(tmp_path, tokens) == 100 and not third.exists()


def test_the_ends_of_the_least_recently_used_texts_go_first(tmp_path: Path) -> None:
    system = text(0, 100)
    ends = [text(1000 * i, 100) for i in range(1, 5)]
    room = {"max_bytes": 420 * TOKEN}  # four segments
    for end in ends[:3]:
        store(tmp_path, system + end, **room)
    old = datetime(2020, 1, 1, tzinfo=timezone.utc).timestamp()
    for i, path in enumerate(files(tmp_path)):
        os.utime(path, (old + i, old + i))
    assert fetch(tmp_path, system + ends[1] + [7], **room) == 200  # the beginning and the second are used now
    store(tmp_path, system + ends[3], **room)
    # The first text was written as one file, whose 100 last tokens the others lack.
    assert [fetch(tmp_path, system + end + [7], **room) for end in ends] == [200, 200, 100, 200]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 420 * TOKEN


def test_a_beginning_goes_after_what_continues_it(tmp_path: Path) -> None:
    beginning = stored(tmp_path, text(0, 100))
    end = stored(tmp_path, text(0, 100) + text(500, 100))
    os.utime(beginning, (0, 0))  # by a clock that was wrong
    store(tmp_path, text(2000, 100), max_bytes=250 * TOKEN)
    assert beginning.exists() and not end.exists()
    os.utime(beginning, (0, 0))
    store(tmp_path, text(3000, 100), max_bytes=250 * TOKEN)
    assert not beginning.exists() and len(files(tmp_path)) == 2


def test_keys_share_the_room_and_nothing_else(tmp_path: Path) -> None:
    store(tmp_path, text(0, 100))
    (first,) = files(tmp_path)
    os.utime(first, (0, 0))
    kept = PromptCache(tmp_path, "f" * 16, 150 * TOKEN)
    assert kept.known(text(0, 100)) == 0
    kept.store(text(0, 100), read(text(0, 100)))
    assert len(files(tmp_path)) == 1 and not first.exists()


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 23, 59, tzinfo=timezone.utc).timestamp()

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.now


def test_a_day_has_a_budget_of_bytes_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    kept = PromptCache(tmp_path, KEY, daily_bytes=250 * TOKEN, clock=clock)

    def stored(cache: PromptCache, start: int) -> bool:
        before = len(files(tmp_path))
        cache.store(text(start, 100), read(text(start, 100)))
        return len(files(tmp_path)) > before

    other = PromptCache(tmp_path, "f" * 16, daily_bytes=250 * TOKEN, clock=clock)  # the folder's budget
    assert stored(kept, 0) and stored(other, 1000) and not caplog.records
    assert not stored(kept, 2000) and not stored(kept, 3000)
    (warning,) = caplog.records
    assert "budget" in warning.getMessage()
    clear(tmp_path)
    assert not stored(kept, 4000)  # what was written stays written
    clock.now += 120
    assert stored(kept, 2000) and stored(kept, 3000) and len(caplog.records) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"day": 3, "bytes": "x"}', "\x00" * 40, "[" * 5000])
def test_a_damaged_count_begins_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "written.json").write_text(content)
    assert store(tmp_path, text(0, 100)) > 0
    assert json.loads((tmp_path / "written.json").read_text())["bytes"] > 100 * TOKEN


def test_the_default_budget_is_ten_times_the_room(tmp_path: Path) -> None:
    written = [store(tmp_path, text(1000 * i, 100), max_bytes=110 * TOKEN) for i in range(12)]
    assert sum(size > 0 for size in written) == 10


def test_only_headers_are_read_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, text(0, 100))
    store(tmp_path, text(0, 100) + text(500, 50))
    monkeypatch.setattr(prompt_cache, "read_into", lambda *_: pytest.fail("data was read"))
    kept = PromptCache(tmp_path, KEY)
    assert [kept.known(text(0, length)) for length in (0, 1, 7, 8, 50, 200)] == [0, 0, 0, 7, 49, 100]
    assert kept.known(text(0, 100) + text(500, 60)) == 150


MORE = [pytest.param(mx.float32, None, marks=pytest.mark.long), pytest.param(mx.bfloat16, 8, marks=pytest.mark.long)]


@pytest.mark.parametrize(("dtype", "bits"), [(mx.bfloat16, None), (mx.bfloat16, 4), *MORE])
def test_no_second_copy_in_memory(tmp_path: Path, dtype: mx.Dtype, bits: int | None) -> None:
    """The peak of MLX's memory while storing and fetching 60 000 tokens."""
    length, layers = 60_000, 6
    held = caches(bits, length, layers)
    mx.random.seed(0)
    for cache in held:
        keys = mx.random.normal((1, 2, length, 32)).astype(dtype)
        cache.update_and_fetch(keys, -keys)
        mx.eval(cache.state)
    del keys, cache
    sums = [mx.sum(part.astype(mx.float32)[..., : length - 1, :]).item() for _, part in _parts(held)]
    size = sum(cache.nbytes for cache in held)
    tokens = [i * 7919 % 50000 for i in range(length)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    PromptCache(tmp_path, KEY).store(tokens, held)
    assert mx.get_peak_memory() - before <= 0.1 * size
    assert sum(path.stat().st_size for path in files(tmp_path)) > size
    held = caches(bits, length, layers)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert PromptCache(tmp_path, KEY).fetch(tokens, held) == length - 1
    assert size <= mx.get_peak_memory() - before <= 1.1 * size
    assert sums == [mx.sum(part.astype(mx.float32)[..., : length - 1, :]).item() for _, part in _parts(held)]


def _parts(held: list[Any]) -> list[tuple[str, mx.array]]:
    return tree_flatten([[cache.keys, cache.values] for cache in held])  # type: ignore[return-value]


def test_a_file_is_safetensors(tmp_path: Path) -> None:
    tokens = text(0, 100)
    store(tmp_path, tokens, name="owner/model")
    (path,) = files(tmp_path)
    arrays, said = mx.load(str(path), return_metadata=True)
    assert said["model"] == "owner/model" and len(arrays) == 2 * LAYERS
    assert mx.array_equal(arrays["1.keys"], read(tokens)[1].keys)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    hashes = [hashlib.sha256(part).hexdigest()[:32] for part in (content[:size], content[size:])]
    assert path.stem == "-".join([KEY, *hashes])


def forged(folder: Path, header: dict[str, Any] | bytes, data: bytes, claim: int | None = None) -> Path:
    """A file whose name and hashes are right, whatever it says."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = (len(content) if claim is None else claim).to_bytes(8, "little") + content
    hashes = [hashlib.sha256(part).hexdigest()[:32] for part in (content, data)]
    path = folder / f"{'-'.join([KEY, *hashes])}.safetensors"
    path.write_bytes(content + data)
    return path


def said(**changes: Any) -> dict[str, Any]:
    metadata = {"segment": "1", "model": "", "parent": "", "start": "0", "tokens": "CgAAAAsAAAA="} | changes  # 10, 11
    return {"__metadata__": metadata}


ARRAY = {"dtype": "F32", "shape": [1, 2, 2, 32], "data_offsets": [0, 512]}
FORGED: dict[str, tuple[Any, bytes, int | None]] = {
    "a huge header": (b"{}", b"", 2**62),
    "nothing": (b"", b"", 0),
    "deep": (b"[" * 100_000, b"", None),
    "not an object": (b"[1]", b"", None),
    "no metadata": ({"0.keys": ARRAY}, bytes(512), None),
    "another version": (said(segment="2"), b"", None),
    "no tokens": (said(tokens=""), b"", None),
    "half a token": (said(tokens="CgA="), b"", None),
    "tokens that are no base64": (said(tokens="!!"), b"", None),
    "no place": (said(start="x"), b"", None),
    "a start without a parent": (said(start="5"), b"", None),
    "its own number": (said(start=7), b"", None),
    "a parent that is a list": (said(parent=[1], start="1"), b"", None),
    "overlapping data": (said() | {"0.keys": ARRAY, "0.values": ARRAY}, bytes(512), None),
    "less data": (said() | {"0.keys": ARRAY}, bytes(500), None),
    "a negative axis": (said() | {"0.keys": ARRAY | {"shape": [1, -2, 2, -32]}}, bytes(512), None),
    "a huge axis": (said() | {"0.keys": ARRAY | {"shape": [1, 2**40, 2, 32]}}, bytes(512), None),
    "other tokens": (said() | {"0.keys": ARRAY | {"shape": [1, 2, 4, 16]}}, bytes(512), None),
    "an unknown type": (said() | {"0.keys": ARRAY | {"dtype": "Q4"}}, bytes(512), None),
    "a type that is a list": (said() | {"0.keys": ARRAY | {"dtype": []}}, bytes(512), None),
    "one layer": (said() | {"0.keys": ARRAY, "0.values": ARRAY | {"data_offsets": [512, 1024]}}, bytes(1024), None),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_file_made_by_someone_else_is_dropped(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = forged(tmp_path, *FORGED[kind])
    assert fetch(tmp_path, [10, 11, 12, 13]) == 0
    assert not path.exists() and len(caplog.records) == 1 and "damaged" in caplog.text


def test_a_file_that_names_itself_as_its_parent_is_removed(tmp_path: Path) -> None:
    path = forged(tmp_path, said(parent="none-such", start="1"), b"")
    assert fetch(tmp_path, [10, 11, 12, 13]) == 0 and not path.exists()


def test_segments_of_another_shape_do_not_mix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A segment whose heads differ from its parent's."""
    store(tmp_path, text(0, 100))
    (first,) = files(tmp_path)
    names = [f"{i}.{name}" for i in range(LAYERS) for name in ("keys", "values")]
    arrays = {name: ARRAY | {"data_offsets": [256 * i, 256 * i + 256], "dtype": "BF16"} for i, name in enumerate(names)}
    header = said(parent=first.name, start="100") | arrays
    path = forged(tmp_path, header, bytes(256 * len(names)))
    assert fetch(tmp_path, [*text(0, 100), 10, 11, 12]) == 100
    assert not path.exists() and first.exists() and "damaged" in caplog.text


def test_very_long_texts_have_several_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MOST_TOKENS", 100)
    store(tmp_path, text(0, 250))
    assert len(files(tmp_path)) == 3 and fetch(tmp_path, text(0, 251)) == 250


def test_what_a_folder_has(tmp_path: Path) -> None:
    assert entries(tmp_path / "none") == [] and clear(tmp_path / "none") == (0, 0)
    store(tmp_path, text(0, 200), name="one")
    store(tmp_path, text(0, 200) + text(500, 50), name="one")
    store(tmp_path, text(0, 100) + text(700, 50), name="one")
    PromptCache(tmp_path, "f" * 16, name="two").store(text(0, 30), read(text(0, 30)))
    (tmp_path / "README").write_text("mine")
    texts = entries(tmp_path)
    assert [(entry.name, entry.key, entry.tokens) for entry in texts] == [
        ("two", "f" * 16, 30),
        ("one", KEY, 150),
        ("one", KEY, 250),
    ]
    sizes = [path.stat().st_size for path in files(tmp_path)]
    root = next(path.stat().st_size for path in files(tmp_path) if path.stat().st_size > 200 * TOKEN)
    assert [entry.shared for entry in texts] == [0, root, root]
    assert sum(entry.bytes for entry in texts) - root == sum(sizes)
    assert clear(tmp_path, names=["two"])[0] == 1 and [entry.name for entry in entries(tmp_path)] == ["one", "one"]
    assert clear(tmp_path, KEY)[0] == 3 and entries(tmp_path) == [] and (tmp_path / "README").exists()


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # on Linux
    assert default_folder().parts[-2:] == ("mlx-resonance", "prompts")


FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def test_the_key_of_angles_that_change_with_the_length(tmp_path: Path) -> None:
    longrope = RopeConfig(
        16, "longrope", max_position_embeddings=512,
        parameters=FACTORS | {"original_max_position_embeddings": 64},
    )  # fmt: skip
    dynamic = RopeConfig(16, "resonance_dynamic", max_position_embeddings=64, parameters={"factor": 4.0})
    checkpoints = [Checkpoint.open(make(tmp_path / r.base_type, "llama", r, "4")) for r in (longrope, dynamic)]
    sides = [cache_key(checkpoints[0], None, length) for length in (1, 64, 65, 400)]
    assert sides[0] == sides[1] != sides[2] == sides[3]
    assert cache_key(checkpoints[0], None, 400, 65) == sides[2]
    assert cache_key(checkpoints[1], None, 10) == cache_key(checkpoints[1], None, 64)
    for checkpoint, *lengths in [
        (checkpoints[0],), (checkpoints[1],),  # no length
        (checkpoints[0], 70, 60),  # the prompt's keys have other angles than the answer's
        (checkpoints[1], 65), (checkpoints[1], 65, 60),  # every length has its own
    ]:  # fmt: skip
        with pytest.raises(UsageError, match="change with the length of a text"):
            cache_key(checkpoint, None, *lengths)


@pytest.mark.parametrize("length", [40, 300])
def test_a_text_on_either_side_of_the_length_is_the_same_text(tmp_path: Path, length: int) -> None:
    rope = RopeConfig(
        16, "longrope", max_position_embeddings=512, parameters=FACTORS | {"original_max_position_embeddings": 64}
    )
    checkpoint = Checkpoint.open(make(tmp_path / "model", "llama", rope, "4"))
    tokens = [1 + i * 37 % 2000 for i in range(length)]
    answers, known = [], []
    for kept in (None, "kept", "kept"):
        model = checkpoint.load()
        folder = PromptCache(tmp_path / kept, cache_key(checkpoint, None, length + 8, length)) if kept else None
        known.append(0 if folder is None else folder.known(tokens))
        answer = stream_generate(model, checkpoint.tokenizer, tokens, max_tokens=8, disk_cache=folder)
        answers.append([response.token for response in answer])
    assert answers[0] == answers[1] == answers[2] and known == [0, 0, length - 1]


def test_a_segment_is_named_by_its_content(tmp_path: Path) -> None:
    """Two processes that write the same text write the same file."""
    for folder in ("one", "other"):
        store(tmp_path / folder, text(0, 50))
    assert [path.name for path in files(tmp_path / "one")] == [path.name for path in files(tmp_path / "other")]
    segment = prompt_segments.read_segment(files(tmp_path / "one")[0])
    assert segment.key == KEY and segment.tokens.tolist() == text(0, 50) and (segment.start, segment.end) == (0, 50)
