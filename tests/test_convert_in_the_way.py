"""Other people's files and folders where a conversion would write: refused, and left as they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance.convert import convert
from mlx_resonance.convert.journal import workspace

import pytest

from .checkpoints import contents


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("record", [b"", b"{", b"[1]", b"\xff\xfe", b'{"from": "another tool"}'])
def test_a_folder_with_another_journal_is_left_alone(
    random_llama: Path, tmp_path: Path, record: bytes, restart: bool
) -> None:
    """Ours is written atomically: a damaged one is somebody else's, and so are the files beside it."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "conversion.json").write_bytes(record)
    (partial / "thesis.txt").write_text("of years")
    before = contents(partial)
    with pytest.raises(FileExistsError, match="in the way"):
        convert(random_llama, tmp_path / "out", restart=restart)
    assert contents(partial) == before


def test_two_runs_at_once(random_llama: Path, tmp_path: Path) -> None:
    with workspace(tmp_path / "out", {}, {}):
        before = contents(tmp_path / "out.partial")
        with pytest.raises(FileExistsError, match="another run is writing"):
            convert(random_llama, tmp_path / "out")
        assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("."), None], ids=["file", "link", "folder"])
@pytest.mark.parametrize("restart", [False, True])
def test_what_is_not_ours_is_left_alone(
    random_llama: Path, tmp_path: Path, make: Callable[[Path], None] | None, restart: bool
) -> None:
    partial = tmp_path / "out.partial"
    if make is None:
        shutil.copytree(random_llama, partial)
    else:
        make(partial)
    with pytest.raises(FileExistsError, match="in the way"):
        convert(random_llama, tmp_path / "out", restart=restart)
    assert make is not None or contents(partial) == contents(random_llama)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize(
    "weights",
    [{"a": 1}, {"x.safetensors": None}, {"../model.safetensors": {"bytes": 1, "sha256": ""}},
     {"model.safetensors": {"bytes": "1", "sha256": ""}}, {"model.safetensors": {"bytes": 1}},
     {"model.safetensors": {"bytes": 1, "sha256": "", "quantization_error": 3}}],
)  # fmt: skip
def test_an_edited_journal_is_somebody_elses(random_llama: Path, tmp_path: Path, weights: Any) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    record = {"source": {}, "settings": {}, "weights": weights}
    (partial / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(FileExistsError, match="in the way"):
        convert(random_llama, tmp_path / "out")


def test_a_pipe_as_journal_does_not_hang(random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    os.mkfifo(tmp_path / "out.partial" / "conversion.json")
    with pytest.raises(FileExistsError, match="in the way"):
        convert(random_llama, tmp_path / "out")
