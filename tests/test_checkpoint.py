"""Opening a checkpoint: its files, on disk and on a hub, what is refused, and its digest."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import shutil
import struct
import weakref
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, content_hash, load
from mlx_resonance.files import INDEX, read_header, resolve, weight_files

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model

from .hub import serve


def test_load_gives_a_model_and_a_tokenizer(random_llama: Path) -> None:
    model, tokenizer = load(random_llama)
    assert isinstance(model, Model) and not model.training
    assert model(mx.array([tokenizer.encode("import os")])).shape[-1] == 2048
    assert tokenizer.decode(tokenizer.encode("import os", add_special_tokens=False)) == "import os"


def test_a_missing_tokenizer_is_named(random_llama: Path, copy_of: Any) -> None:
    folder = copy_of(random_llama)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load(folder)


def test_tied_embeddings_are_inferred_from_the_weights(random_llama: Path, copy_of: Any) -> None:
    folder = copy_of(random_llama, tie_word_embeddings=None)
    assert "lm_head" in Checkpoint.open(folder).load()
    for name in (INDEX, *(file.name for file in folder.glob("model-*.safetensors"))):
        (folder / name).unlink()
    untied = dict(tree_flatten(Checkpoint.open(random_llama).load().parameters()))
    del untied["lm_head.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), untied)
    assert "lm_head" not in Checkpoint.open(folder).load()


@pytest.mark.parametrize(
    ("weight_map", "error", "named"),
    [
        ({"a": "../secret.safetensors"}, ValueError, "same folder"),
        ({"a": "/etc/passwd"}, ValueError, "same folder"),
        ({"a": "model-9.safetensors"}, FileNotFoundError, "model-9.safetensors is missing"),
        (["a"], ValueError, "weight_map"),
        (None, ValueError, "weight_map"),
    ],
)
def test_a_damaged_index_is_refused(
    random_llama: Path, copy_of: Any, weight_map: Any, error: type[Exception], named: str
) -> None:
    folder = copy_of(random_llama)
    (folder / INDEX).write_text(json.dumps({} if weight_map is None else {"weight_map": weight_map}))
    with pytest.raises(error, match=named):
        weight_files(folder)


def test_a_weight_file_that_the_index_does_not_name_is_refused(random_llama: Path, copy_of: Any) -> None:
    folder = copy_of(random_llama)
    mx.save_safetensors(str(folder / "model-backup.safetensors"), {"model.norm.weight": mx.zeros(64)})
    with pytest.raises(ValueError, match=r"model-backup\.safetensors is not named"):
        load(folder)


@pytest.mark.parametrize(
    ("entries", "size", "named"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [0, 8])}, 8, "invalid offset for tensor `[ab]`"),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, 12, "invalid offset for tensor `b`"),
        ({"a": ("F32", [2], [4, 12])}, 12, "invalid offset for tensor `a`"),
        ({"a": ("F32", [3], [0, 8])}, 8, "invalid shape, data type, or offset"),
        ({"a": ("F32", [-2], [0, -8])}, 0, "integer `-2`"),
        ({"a": ("F99", [2], [0, 8])}, 8, "unknown variant `F99`"),
    ],
    ids=["same place", "overlap", "gap", "shape", "negative", "dtype"],
)
def test_tensors_that_do_not_fill_the_file_are_refused(
    tmp_path: Path, entries: dict[str, Any], size: int, named: str
) -> None:
    keys = ("dtype", "shape", "data_offsets")
    header = json.dumps({name: dict(zip(keys, entry, strict=True)) for name, entry in entries.items()}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{named}"):
        read_header(tmp_path / "model.safetensors")


def test_the_adapter_and_the_revision_are_used(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import mlx_lm.utils

    asked: list[object] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend([name, revision, "config.json" in allow_patterns or "*.json" in allow_patterns])
        return str(random_llama)

    def adapt(model: Any, path: str) -> Any:
        asked.append(path)
        return model

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(mlx_lm.utils, "load_adapters", adapt)
    load("someone/random-llama", revision="v2", adapter_path="adapters")
    assert asked == ["someone/random-llama", "v2", True, "adapters"]


def test_a_broken_tokenizer_is_one_error(random_llama: Path, copy_of: Any) -> None:
    folder = copy_of(random_llama)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot be loaded"):
        load(folder)


def test_a_model_can_be_copied(random_llama: Path) -> None:
    model = Checkpoint.open(random_llama).load()
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(copy.deepcopy(model)(tokens), model(tokens))


def test_every_truncation_is_noticed(stdlib_llama: Path, tmp_path: Path) -> None:
    whole = (stdlib_llama / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1]
    lengths += random.Random(0).sample(range(len(whole)), 40)
    damaged = tmp_path / "model.safetensors"
    for length in lengths:
        damaged.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            read_header(damaged)
    damaged.write_bytes(whole)
    read_header(damaged)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"[[]]",
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 7) + b'{"a":{}}'[:7],
        struct.pack("<Q", 26) + b'{"a":{"data_offsets":[0]}}',
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_header(tmp_path / "model.safetensors")


def test_a_model_the_hub_does_not_have_is_one_line(random_llama: Path, tmp_path: Path) -> None:
    with serve("someone/random-llama", random_llama) as hub:
        done = hub.command(tmp_path / "cache", "inspect", "someone/else")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "someone/else" in done.stderr


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing", "a/b/c"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve(name, None, ["*"])


# --- the digest


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mlx_resonance.content_hash.SMALL", 1000)
    return tmp_path / "cache"


def test_the_digest_is_of_content_alone(
    random_llama: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "copy")
    digest = Checkpoint.open(random_llama).digest
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.chdir(folder.parent)
    assert (
        Checkpoint.open(folder).digest == Checkpoint.open("copy").digest == Checkpoint.open("./copy/").digest == digest
    )


def test_a_note_in_the_folder_changes_nothing(random_llama: Path, tmp_path: Path, cache_home: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "copy")
    digest = Checkpoint.open(folder).digest
    for name in ("notes.txt", "results.json", "README.md"):
        (folder / name).write_text("{}")
    assert Checkpoint.open(folder).digest == digest


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model-00002-of-00003.safetensors"]
)
def test_any_changed_file_changes_the_digest(random_llama: Path, copy_of: Any, cache_home: Path, name: str) -> None:
    folder = copy_of(random_llama)
    digest = Checkpoint.open(folder).digest
    content = (folder / name).read_bytes()
    if name == "config.json":
        (folder / name).write_text(json.dumps(json.loads(content) | {"rms_norm_eps": 1e-4}))
    else:
        place = len(content) // 2
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    os.utime(folder / name, (1, 1))
    assert Checkpoint.open(folder).digest != digest
    (folder / name).write_bytes(content)
    assert Checkpoint.open(folder).digest == digest


def test_a_large_file_is_hashed_once(random_llama: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    original = content_hash.sha256
    monkeypatch.setattr(content_hash, "sha256", lambda path: hashed.append(path) or original(path))
    first = Checkpoint.open(random_llama).digest
    assert any(path.suffix == ".safetensors" for path in hashed)
    hashed.clear()
    assert Checkpoint.open(random_llama).digest == first
    assert not any(path.suffix == ".safetensors" for path in hashed)
    for path in cache_home.rglob("*"):  # a damaged entry is not trusted
        if path.is_file():
            path.write_text("half")
    assert Checkpoint.open(random_llama).digest == first and hashed


def test_a_cache_that_cannot_be_written_is_skipped(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("mlx_resonance.content_hash.SMALL", 1000)
    assert Checkpoint.open(random_llama).digest


def test_rope_and_kv_format_are_settings_beside_the_digest(random_llama: Path) -> None:
    checkpoint = Checkpoint.open(random_llama)
    stretched = checkpoint.rescaled(8)
    assert stretched.digest == checkpoint.digest and stretched.own_rope == checkpoint.rope != stretched.rope
    digests = {opened.results_digest(bits) for opened in (checkpoint, stretched) for bits in (None, 8, 4)}
    assert len(digests) == 6
    assert stretched.settings(8) == {"digest": checkpoint.digest, "rope": stretched.rope.to_hf(), "kv_bits": 8}


def test_a_model_is_freed_with_its_last_reference(stdlib_llama: Path) -> None:
    """Without Python's collector of cycles, which may come long after the memory is needed."""
    gc.collect()
    gc.disable()
    try:
        model = Checkpoint.open(stdlib_llama).load()
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()
