"""Files of JSON lines: whole or as before, whatever ends the run that writes them."""

from __future__ import annotations

import errno
import multiprocessing
import resource
import signal
from pathlib import Path

from mlx_resonance.records import append_records, open_records, read_records

import pytest

HEADER = {"settings": {"length": 64, "sizes": (1, 2)}}


def test_made_then_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    assert open_records(path, "passkey", HEADER) == []
    append_records(path, [{"n": 1}, {"n": 2}])
    assert open_records(path, "passkey", HEADER) == [{"n": 1}, {"n": 2}]
    assert read_records(path, "passkey")[0] == {"passkey": 1, "settings": {"length": 64, "sizes": [1, 2]}}


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_an_unfinished_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    open_records(path, "passkey", HEADER)
    append_records(path, [{"n": 1}, {"n": 2}])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_records(path, "passkey")[1] == [{"n": 1}]
    assert open_records(path, "passkey", HEADER) == [{"n": 1}]
    append_records(path, [{"n": 3}])
    assert open_records(path, "passkey", HEADER) == [{"n": 1}, {"n": 3}]


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    open_records(path, "passkey", HEADER)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="length is 64 there, 65 now"):
        open_records(path, "passkey", {"settings": {"length": 65, "sizes": (1, 2)}})
    with pytest.raises(ValueError, match="no file of posgen results"):
        open_records(path, "posgen", HEADER)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"{}\n", b"[1]\n", b"no JSON\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b'{"passkey": 2}\n', b"\n"],
    ids=["no header", "no object", "no JSON", "deep", "no text", "another version", "blank"],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt is no file of passkey results"):
        open_records(path, "passkey", HEADER)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="is no file of passkey results"):
        read_records(tmp_path, "passkey")
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none", "passkey")


def fill_the_disk(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))  # a part of the lines fits
    append_records(path, [{"n": i} for i in range(100)])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    open_records(path, "passkey", HEADER)
    append_records(path, [{"n": 1}])
    before = path.read_bytes()
    writer = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(path,))
    writer.start()
    writer.join()
    assert writer.exitcode == 1  # it raised OSError
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_cannot_be_cut_names_the_cause() -> None:
    with pytest.raises(OSError) as error:
        append_records(Path("/dev/full"), [{"n": 1}])
    assert error.value.errno == errno.ENOSPC
