"""Atomic files and folders, outputs that cannot be written; what a checkpoint's folder inherits from its source."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mlx_resonance.convert import convert
from mlx_resonance.finetuning import run as finetuning
from mlx_resonance.storage import atomic_file, atomic_folder, check_output, disk_errors
from mlx_resonance.tokenizer import tokenizer_files

import pytest

SHORT = ("--length", 64, "--steps", 1, "--accumulate", 1)


def test_a_folder_is_made_by_one_rename(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "out", "result") as partial:
        (partial / "result").mkdir()
        (partial / "result" / "file").touch()
        (partial / "rest").touch()
        with pytest.raises(FileExistsError, match=r"another run is writing"):
            atomic_folder(tmp_path / "new" / "out").__enter__()
        assert not (tmp_path / "new" / "out").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "new", "new/out", "new/out/file",
    ]  # fmt: skip


def test_a_fault_leaves_finished_work(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"] and (tmp_path / "out.partial/file").exists()
    with atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_os_error_and_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("before")
    with pytest.raises(OSError, match=r"^.*a\.safetensors cannot be written \(full\), [\d.,]+ [MG]B are free"):
        with atomic_file(path) as partial, disk_errors(path):
            partial.write_text("a part")
            raise RuntimeError("full")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "before"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is a named pipe"),
        (lambda path: path.symlink_to("/dev/null"), "is a device"),
    ],
    ids=["folder", "pipe", "device"],
)
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, make: Any, named: str) -> None:
    make(tmp_path / "out.jsonl")
    with pytest.raises(FileExistsError, match=rf"out\.jsonl {named}: a file is needed"):
        check_output(tmp_path / "out.jsonl")


def test_an_output_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        check_output(tmp_path / "file" / "out.jsonl")
    check_output(tmp_path / "new" / "out.jsonl")


def finetune(run: Any, model: Path, tmp_path: Path) -> tuple[int, str, str]:
    (tmp_path / "data.txt").write_text("import os\n" * 100)
    return run("finetune", "--model", model, "--data", tmp_path / "data.txt", "--mlx-path", tmp_path / "out", *SHORT)


def test_a_run_that_ended_meanwhile_is_seen_before_training(
    run: Any, stdlib_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(path: Path) -> Any:
        (tmp_path / "out").mkdir()
        return [Path(path)], []

    monkeypatch.setattr(finetuning, "data_files", other)
    code, _, err = finetune(run, stdlib_llama, tmp_path)
    assert code == 2 and err.endswith("out exists: give another --mlx-path\n") and err.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt", "out"]


def test_a_fine_tuned_checkpoint_has_the_tokenizer_of_its_source(run: Any, stdlib_llama: Path, tmp_path: Path) -> None:
    source, templates = tmp_path / "source", "additional_chat_templates"
    shutil.copytree(stdlib_llama, source)
    (source / templates).mkdir()
    (source / templates / "tools.jinja").write_text("{{ messages }}")
    for name in ("pytorch_model.bin.index.json", "conversion.json"):
        (source / name).write_text(json.dumps({"weight_map": {}}))
    code, _, err = finetune(run, source, tmp_path)
    assert code == 0, err
    out = tmp_path / "out"
    names = [path.relative_to(source).as_posix() for path in tokenizer_files(source)]
    assert f"{templates}/tools.jinja" in names and "tokenizer.json" in names
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not list(out.glob("pytorch_model*")) and not (out / "conversion.json").exists()


def test_the_card_names_no_folder_as_base_model(
    stdlib_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(stdlib_llama.parent))
    card = (convert(f"~/{stdlib_llama.name}", tmp_path / "out").path / "README.md").read_text()
    assert "base_model" not in card and "\n`stdlib-llama` converted to MLX" in card and "~" not in card
