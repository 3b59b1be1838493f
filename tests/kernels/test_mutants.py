"""The mutants' hashes: which change of which file makes `mutants.py --if-changed` run them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from . import mutants

DECISIVE = {
    "mlx_resonance/frequencies.py",
    *(f"mlx_resonance/kernels/{name}" for name in ("body.h", "rotary.h", "metal.h", "cuda.h", "kernel.py", "ops.py")),
    *(f"tests/kernels/{name}" for name in ("emulator.py", "harness.h", "shim.h", "checks.py", "mutants.py")),
    *(f"tests/kernels/{name}" for name in ("test_kernel.py", "test_source.py", "conftest.py")),
    "tests/oracle.py",
    "tests/rotations.py",
}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernel and its tests, whose mutants have all been noticed."""
    for part in ("mlx_resonance", "tests"):
        shutil.copytree(mutants.ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns(".built", "assets", "data"))
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "HASHES", tmp_path / "mutants.sha256")
    monkeypatch.setattr(mutants, "survivors", lambda names: [])
    monkeypatch.setattr("sys.argv", ["mutants.py"])
    mutants.main()
    return tmp_path


def test_every_change_of_a_decisive_file_is_noticed(copy: Path) -> None:
    assert mutants.changed() == []
    for name in DECISIVE:
        with (copy / name).open("a") as file:
            file.write("\n")
    assert DECISIVE <= set(mutants.changed())


def test_other_files_do_not_count(copy: Path) -> None:
    for name in ("mlx_resonance/rope.py", "tests/conftest.py", "tests/test_rope.py", "tests/kernels/test_gpu.py"):
        (copy / name).write_text("")
    assert mutants.changed() == []


def test_new_and_removed_files_count(copy: Path) -> None:
    (copy / "mlx_resonance/kernels/new.h").touch()
    (copy / "tests/kernels/checks.py").unlink()
    assert mutants.changed() == ["mlx_resonance/kernels/new.h", "tests/kernels/checks.py"]


@pytest.mark.parametrize(
    ("arguments", "survive", "written"), [([], [], True), ([], ["none"], False), (["none"], [], False)], ids=str
)
def test_hashes_are_written_after_a_complete_run_without_survivors(
    copy: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], survive: list[str], written: bool
) -> None:
    mutants.HASHES.unlink()
    monkeypatch.setattr(mutants, "survivors", lambda names: survive)
    monkeypatch.setattr("sys.argv", ["mutants.py", *arguments])
    if survive:
        with pytest.raises(SystemExit, match="1"):
            mutants.main()
    else:
        mutants.main()
    assert mutants.HASHES.exists() == written


def test_unchanged_files_take_one_line(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mutants.py", "--if-changed"])
    monkeypatch.setattr(mutants, "survivors", lambda names: ["one"])
    mutants.main()
    assert len(capsys.readouterr().out.splitlines()) == 1
    (copy / "mlx_resonance/kernels/body.h").write_text("")
    with pytest.raises(SystemExit, match="1"):
        mutants.main()
    assert "mlx_resonance/kernels/body.h" in capsys.readouterr().out


def test_every_fault_is_in_the_kernel() -> None:
    for name, fault in mutants.FAULTS.items():
        text = (mutants.ROOT / "mlx_resonance" / "kernels" / fault.file).read_text()
        assert text.count(fault.right) == 1, name
