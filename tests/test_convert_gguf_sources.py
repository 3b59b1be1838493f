"""Which GGUF files a conversion reads: a file, a folder, parts of a split one, one of several, one on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint
from mlx_resonance.convert import convert, verify

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from .checkpoints import contents
from .gguf_files import model_file
from .hub import COMMIT, serve
from .test_weights_read_right import COMMANDS, filled

REPO = "someone/tiny-GGUF"
PARTS = [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, and another in three parts."""
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    model_file(folder / "whole.gguf", kind=Kind.Q8_0)
    model_file(folder / "tiny.gguf", each=8)
    assert sorted(path.name for path in folder.iterdir()) == [*PARTS, "whole.gguf"]
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_file_with_everything_in_it(run: Any, folder: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", folder / "whole.gguf", "--mlx-path", tmp_path / "out", "--verify")
    assert code == 0 and "verified" in err, err
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.tokenizer.encode("a b") == [checkpoint.tokenizer.encode(letter)[-1] for letter in ("a", " ", "b")]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("ä a")) == "ä a"
    assert (checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]) == (300, 301)
    assert checkpoint.tokenizer.eos_token_ids == {301}
    assert checkpoint.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"]["name"] == "whole.gguf" and record["settings"]["dtype"] == "float16"


def test_a_folder_with_one_is_that_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("tiny*"))
    convert(tmp_path / "one" / "whole.gguf", tmp_path / "of-file" / "out")
    convert(tmp_path / "one", tmp_path / "of-folder" / "out")
    assert contents(tmp_path / "of-file" / "out") == contents(tmp_path / "of-folder" / "out")


@pytest.mark.parametrize("part", [None, *PARTS])
def test_a_split_file_is_found_from_any_part(folder: Path, tmp_path: Path, part: str | None) -> None:
    shutil.copytree(folder, tmp_path / "split", ignore=shutil.ignore_patterns("whole*"))
    convert(tmp_path / "split" / (part or ""), tmp_path / "out", dtype="float32", verify=True)
    model_file(tmp_path / "whole.gguf")
    convert(tmp_path / "whole.gguf", tmp_path / "of-one", dtype="float32")
    assert weights(tmp_path / "out") == weights(tmp_path / "of-one")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["source"]["name"] == PARTS[0] and set(PARTS) <= set(record["source"])


def test_one_of_several_is_named(run: Any, folder: Path, tmp_path: Path) -> None:
    command = ("convert", folder, "--mlx-path", tmp_path / "out")
    code, out, err = run(*command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"several GGUF files ({PARTS[0]}, whole.gguf): one must be named: give --file" in err
    for name, named in {
        "other.gguf": f"has no other.gguf; it has {PARTS[0]}, whole.gguf (--file)",
        "whole.safetensors": "'whole.safetensors' is not the name of a .gguf file",
        "": "'' is not the name of a .gguf file",
        "../tiny/whole.gguf": "'../tiny/whole.gguf' is not in ",
        "tiny-00004-of-00003.gguf": "is part 4 of 3",
        "tiny-00002-of-00004.gguf": "tiny-00001-of-00004.gguf is missing",
        "tiny-00000-of-00000.gguf": "is part 0 of 0",
    }.items():
        code, out, err = run(*command, "--file", name)
        assert (code, out, err.count("\n")) == (2, "", 1) and named in err, err
    code, out, err = run("convert", folder / "whole.gguf", "--mlx-path", tmp_path / "out", "--file", "whole.gguf")
    assert (code, out, err.count("\n")) == (2, "", 1) and "names are for folders and repositories (--file)" in err
    assert list(tmp_path.iterdir()) == []
    assert run(*command, "--file", "whole.gguf")[0] == 0
    code, _, err = run("verify", tmp_path / "out", "--source", folder, "--file", "whole.gguf")
    assert code == 0 and "of the source 21 rounded" in err, err
    code, _, err = run("verify", tmp_path / "out", "--source", folder)
    assert code == 2 and "one must be named: give --file" in err


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_part_is_named(run: Any, folder: Path, tmp_path: Path, missing: int) -> None:
    shutil.copytree(folder, tmp_path / "split", ignore=shutil.ignore_patterns("whole*", PARTS[missing]))
    for source in (tmp_path / "split", tmp_path / "split" / PARTS[missing - 1]):
        code, out, err = run("convert", source, "--mlx-path", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{PARTS[missing]} is missing, one of the 3 parts of a GGUF file" in err


def changed(path: Path, **keys: int) -> None:
    """Write a part that has other split keys, and no tensors."""
    writer = GGUFWriter(path, "llama")
    for key, value in keys.items():
        getattr(writer, "add_int32" if key == "tensors" else "add_uint16")(
            {"tensors": "split.tensors.count"}.get(key, f"split.{key}"), value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, "tiny-00003-of-00003.gguf says split.no = 0, split.count = 1: by its name it is part 2 of 3"),
        ({"no": 1, "count": 3, "tensors": 21}, "says split.no = 1, split.count = 3: by its name it is part 2 of 3"),
        ({"no": 2, "count": 4, "tensors": 21}, "says split.no = 2, split.count = 4: by its name it is part 2 of 3"),
        ({"no": 2, "count": 3, "tensors": 21}, "says split.tensors.count = 21, but its parts have 16 tensors"),
    ],
)
def test_parts_that_are_not_of_one_model(
    run: Any, folder: Path, tmp_path: Path, keys: dict[str, int], named: str
) -> None:
    shutil.copytree(folder, tmp_path / "split", ignore=shutil.ignore_patterns("whole*"))
    changed(tmp_path / "split" / PARTS[2], **keys)
    code, out, err = run("convert", tmp_path / "split", "--mlx-path", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1) and named in err, err


def test_a_part_under_another_name_is_refused(run: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / PARTS[0], tmp_path / "model.gguf")
    code, out, err = run("convert", tmp_path, "--mlx-path", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "says split.no = 0, split.count = 3: by its name it is part 0 of 1" in err


def test_parts_with_the_same_tensor_are_refused(run: Any, folder: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    shutil.copytree(folder, tmp_path / "split", ignore=shutil.ignore_patterns("whole*"))
    tensor = GGUFReader(folder / PARTS[0]).tensors[0]
    third = GGUFReader(folder / PARTS[2])
    writer = GGUFWriter(tmp_path / "split" / PARTS[2], "llama")
    for key, value in {"no": 2, "count": 3}.items():
        writer.add_uint16(f"split.{key}", value)
    for found in [tensor, *third.tensors[1:]]:
        writer.add_tensor(found.name, found.data, raw_dtype=found.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, err = run("convert", tmp_path / "split", "--mlx-path", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"is in {PARTS[0]} and in {PARTS[2]}" in err


def test_a_file_without_a_tokenizer(run: Any, tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.gguf", whole={})
    code, _, err = run("convert", path, "--mlx-path", tmp_path / "out")
    assert code == 2 and "has no tokenizer" in err and "--no-tokenizer" in err
    assert run("convert", path, "--mlx-path", tmp_path / "out", "--no-tokenizer")[0] == 0


@pytest.mark.parametrize("command", [c for n, c in COMMANDS.items() if n != "lm generate"])
def test_other_commands_say_what_makes_a_model_of_it(
    run: Any, folder: Path, tmp_path: Path, command: tuple[Any, ...]
) -> None:
    for name, named in (("whole.gguf", "whole.gguf is a file"), (".", "has no config.json but .gguf files")):
        model = tmp_path / "models" / "model" if name == "." else tmp_path / name
        if name == ".":
            shutil.copytree(folder, model)
        else:
            shutil.copy(folder / name, model)
        code, out, err = run(*filled(command, model))
        assert (code, out, err.count("\n")) == (2, "", 1) and named in err and "convert" in err, err


@pytest.mark.long
def test_on_the_hub_only_the_chosen_file_is_downloaded(folder: Path, tmp_path: Path) -> None:
    with serve(REPO, folder) as hub:
        cache, out = tmp_path / "cache", tmp_path / "out"
        done = hub.command(cache, "convert", REPO, "--mlx-path", out)
        assert done.returncode == 2 and f"{REPO} has several GGUF files ({PARTS[0]}, whole.gguf)" in done.stderr
        done = hub.command(cache, "convert", REPO, "--mlx-path", out, "--file", "whole.gguf", "--dry-run")
        assert done.returncode == 2 and f"{REPO}/whole.gguf is not in the hub's cache" in done.stderr
        assert hub.downloaded == []
        done = hub.command(cache, "convert", REPO, "--mlx-path", out, "--file", "whole.gguf", "--verify")
        assert done.returncode == 0 and hub.downloaded == ["whole.gguf"], done.stderr
        record = json.loads((out / "conversion.json").read_text())
        assert record["source"] == {"name": REPO, "commit": COMMIT, "file": "whole.gguf"}
        done = hub.command(cache, "verify", out)
        assert done.returncode == 0 and "of the source 21 rounded" in done.stderr, done.stderr
        done = hub.command(cache, "convert", REPO, "--mlx-path", tmp_path / "split", "--file", PARTS[1])
        assert done.returncode == 0 and sorted(hub.downloaded[1:]) == PARTS, done.stderr
        for source in (REPO, folder / "whole.gguf"):
            done = hub.command(cache, "verify", out, "--source", source)
            assert done.returncode == 0 and "of the source 21 rounded" in done.stderr, done.stderr
        done = hub.command(cache, "convert", REPO, "--mlx-path", tmp_path / "x", "--file", "no.gguf")
        assert done.returncode == 2 and "has no no.gguf; it has" in done.stderr
    offline = hub.command(
        cache, "convert", REPO, "--mlx-path", tmp_path / "again", "--file", "whole.gguf", HF_HUB_OFFLINE="1"
    )
    assert offline.returncode == 0 and weights(tmp_path / "again") == weights(out), offline.stderr


def test_a_repository_with_one_needs_no_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("tiny*"))
    (tmp_path / "one" / "README.md").write_text("---\nlicense: mit\n---\n")
    with serve(REPO, tmp_path / "one") as hub:
        command = ("convert", REPO, "--mlx-path", tmp_path / "out")
        done = hub.command(tmp_path / "cache", *command, "--consume-source")
        assert done.returncode == 2 and "not in the hub's cache" in done.stderr and done.stderr.count("\n") == 1
        assert "whole.gguf" not in hub.downloaded
        done = hub.command(tmp_path / "cache", *command)
        assert done.returncode == 0 and hub.downloaded.count("whole.gguf") == 1, done.stderr


def test_the_licence_is_kept(tmp_path: Path) -> None:
    whole = {"general.license": "other", "general.license.name": "🦙 1", "general.languages": ["en", "de"]}
    path = model_file(tmp_path / "m.gguf", whole=whole)
    convert(path, tmp_path / "out", tokenizer=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other" in card and "license_name: 🦙 1" in card and "- de" in card and "`m.gguf` converted" in card


def test_verification_without_the_source(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "out", file="whole.gguf")
    found = verify(tmp_path / "out")
    assert found.problems == [] and found.source is None
