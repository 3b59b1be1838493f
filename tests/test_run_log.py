"""The run log: whole lines, whatever ends the run that writes them; results with other settings are refused."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import run_log
from mlx_resonance.errors import UsageError
from mlx_resonance.run_log import RunLog, read_run_log

import pytest

SETTINGS = {"settings": {"length": 64, "sizes": (1, 2)}}


def open_log(path: Path, settings: Any = SETTINGS, **options: Any) -> RunLog:
    return RunLog(path, "passkey", settings, key=("n",), **options)


def test_made_then_resumed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    log = open_log(path, about={"model": "one"})
    assert log.records == []
    log.append({"n": 1}, {"n": 2})
    again = open_log(path, about={"model": "../elsewhere/one"})  # a name is not a setting
    assert again.records == log.records == [{"n": 1}, {"n": 2}]
    assert (1,) in again and (3,) not in again and len(again) == 2
    header = {"passkey": 1, "model": "one", "settings": {"length": 64, "sizes": [1, 2]}}
    assert read_run_log(path, "passkey") == (header, [{"n": 1}, {"n": 2}])


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_an_unfinished_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    open_log(path).append({"n": 1}, {"n": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_run_log(path, "passkey")[1] == [{"n": 1}]
    log = open_log(path)
    assert log.records == [{"n": 1}]
    log.append({"n": 3})
    assert open_log(path).records == [{"n": 1}, {"n": 3}]


def test_an_unfinished_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    open_log(path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        open_log(path)
        assert path.read_bytes() == whole


def test_the_header_of_a_run_in_progress_binds(tmp_path: Path) -> None:
    """Until its process ends, or while there is more of it than the log."""
    path = tmp_path / "results.jsonl"
    text = """
import sys
from mlx_resonance.run_log import RunLog
RunLog(sys.argv[1], "passkey", {"settings": {"length": 64}}, key=("n",))
print("ready", flush=True)
sys.stdin.read()
"""
    other, pipes = {"settings": {"length": 65}}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", text, path], **pipes) as running:  # type: ignore[call-overload]
        assert running.stdout.readline() == b"ready\n"
        before = path.read_bytes()
        with pytest.raises(UsageError, match="length is 64 there and 65 here"):
            RunLog(path, "passkey", other, key=("n",))
        RunLog(path, "passkey", {"settings": {"length": 64}}, key=("n",))
        assert path.read_bytes() == before
        running.kill()
    with pytest.raises(UsageError, match="length is 64 there and 65 here"):
        RunLog(path, "passkey", other, key=("n",), begun=True)
    assert path.read_bytes() == before
    log = RunLog(path, "passkey", other, key=("n",))
    assert path.read_bytes() != before and run_log._lock_of(path).exists()
    log.append({"n": 1})
    assert not run_log._lock_of(path).exists() and run_log._lock_of(path) not in run_log._claims


def test_a_header_without_results_is_replaced_by_other_settings(tmp_path: Path) -> None:
    path, other = tmp_path / "results.jsonl", {"settings": {"length": 65}}
    first = open_log(path, about={"model": "one"})
    before = path.read_bytes()
    open_log(path, about={"model": "two"})
    assert path.read_bytes() == before  # these are its settings
    second = open_log(path, other)
    assert read_run_log(path, "passkey") == ({"passkey": 1, **other}, [])
    with pytest.raises(UsageError, match="length is 65 there and 64 here"):
        first.append({"n": 1})
    second.append({"n": 2})
    assert open_log(path, other).records == [{"n": 2}]
    with pytest.raises(UsageError, match="length is 65 there and 64 here"):
        open_log(path)
    with pytest.raises(UsageError, match="is not a run log of leval results"):
        RunLog(path, "leval", {}, key=("n",))
    path.write_bytes(before)
    with pytest.raises(UsageError, match="is not a run log of leval results"):
        RunLog(path, "leval", {}, key=("n",))
    assert path.read_bytes() == before


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    open_log(path).append({"n": 1})
    before = path.read_bytes() + b'{"n": '
    path.write_bytes(before)
    with pytest.raises(UsageError, match="other settings: length is 64 there and 65 here"):
        open_log(path, {"settings": {"length": 65, "sizes": (1, 2)}})
    with pytest.raises(UsageError, match="is not a run log of posgen results"):
        RunLog(path, "posgen", SETTINGS, key=("n",))
    assert path.read_bytes() == before


def test_another_question_under_the_same_key_is_refused_with_both(tmp_path: Path) -> None:
    log = open_log(tmp_path / "results.jsonl")
    log.append({"n": 1, "question": "who?"})
    assert log.find(1, question="who?") == {"n": 1, "question": "who?"} and log.find(2, question="why?") is None
    with pytest.raises(UsageError, match=r'another result for n 1: question is "who\?" there and "why\?" here'):
        log.find(1, question="why?")


def test_a_result_without_its_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    open_log(path).append({"n": 1, "loss": 2.0}, {"n": 2, "loss": "high"})
    with pytest.raises(UsageError, match=r"line 3 has no 'loss' that is a number"):
        open_log(path, fields={"loss": float})
    path.write_bytes(path.read_bytes() + b'{"n": [], "loss": 1.0}\n')
    with pytest.raises(UsageError, match=r"line 4 has no 'n' that is a string or an integer"):
        open_log(path)


def test_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    log = open_log(tmp_path / "results.jsonl")
    log.append({"n": 1, "loss": 2.0})
    log.append({"n": 1, "loss": 1.0})
    assert log.records == open_log(log.path).records == [{"n": 1, "loss": 1.0}]


def test_results_of_another_process_are_seen(tmp_path: Path) -> None:
    one, other = open_log(tmp_path / "results.jsonl"), open_log(tmp_path / "results.jsonl")
    one.append({"n": 1})
    other.append({"n": 2})
    one.reload()
    assert one.records == [{"n": 1}, {"n": 2}]


def test_it_is_read_again_only_if_another_process_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = open_log(tmp_path / "results.jsonl"), open_log(tmp_path / "results.jsonl")
    reads: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    for n in range(5):
        one.append({"n": n})
        one.reload()
    assert reads == []
    other.append({"n": 5})
    one.append({"n": 6})  # after the other's line
    one.reload()
    assert len(reads) == 1 and [record["n"] for record in one.records] == list(range(7))


def append_many(path: Path, start: int) -> None:
    log = open_log(path)
    for n in range(start, start + 200):
        log.append({"n": n, "text": "x" * 300})


def test_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=append_many, args=(path, start)) for start in (0, 1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {writer.exitcode for writer in writers} == {0}
    assert len(open_log(path).records) == 600


def test_text_of_every_language_and_halves_of_characters(tmp_path: Path) -> None:
    log = open_log(tmp_path / "results.jsonl")
    log.append({"n": 1, "text": "日本語\u2028"}, {"n": 2, "text": "\ud800"})
    assert "日本語" in log.path.read_text(encoding="utf-8")
    assert open_log(log.path).records == log.records


@pytest.mark.parametrize(
    "content",
    [
        b"{}\n", b"[1]\n", b"not JSON\n", b"not JSON", b"[" * 100_000 + b"\n", b"\xff\xfe\n",
        b'{"passkey": 2}\n', b"\n",
    ],
    ids=["no header", "list", "not JSON", "without an end", "deep", "not text", "another version", "blank"],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"notes\.txt is not a run log of passkey results"):
        open_log(path)
    assert path.read_bytes() == content
    with pytest.raises(UsageError, match="is not a run log of passkey results"):
        read_run_log(tmp_path, "passkey")
    with pytest.raises(FileNotFoundError):
        read_run_log(tmp_path / "none", "passkey")


def fill_the_disk(log: RunLog) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = log.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))  # some of the lines fit
    log.append(*({"n": i} for i in range(100)))


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    log = open_log(tmp_path / "results.jsonl")
    log.append({"n": 1})
    before = log.path.read_bytes()
    writer = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(log,))
    writer.start()
    writer.join()
    assert writer.exitcode == 1  # it raised OSError
    assert log.path.read_bytes() == before
