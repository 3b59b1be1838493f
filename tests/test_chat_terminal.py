"""A chat at a terminal: faults that do not end it, what is left of a terminal, history, lines wrapped at words."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_resonance import load
from mlx_resonance.checkpoint import Checkpoint
from mlx_resonance.cli import engine, errors, terminal
from mlx_resonance.cli.answer import Printer
from mlx_resonance.cli.dialogue import Dialogue
from mlx_resonance.cli.signals import ended_by
from mlx_resonance.cli.terminal import History, Interrupts, Reading
from mlx_resonance.errors import DeviceError

import pytest
from rich.console import Console
from rich.progress import Progress

from .test_conversation import ask, talk


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


def typed(monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue, *lines: str) -> None:
    """Have these lines typed at a terminal."""
    dialogue.terminal = True
    monkeypatch.setattr(dialogue, "_typed", lambda: iter(lines))
    dialogue.run()


def dialogue_of(loaded: Any, **options: Any) -> Dialogue:
    return Dialogue(talk(loaded, **options), io.StringIO(), SimpleNamespace(params=[]), {})


def test_no_fault_ends_a_chat(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dialogue = dialogue_of(loaded, max_tokens=2)
    conversation = dialogue.conversation
    ask(conversation, "import os")
    stream, asked = conversation.engine.stream, []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        asked.append(len(conversation.engine.tokens))
        if len(asked) == 1:
            raise RuntimeError("[metal]\nout of memory")
        return stream(*arguments, **options)

    class Broken(Printer):
        def write(self, text: str) -> None:
            if len(asked) == 2:
                raise LookupError("no such style")
            super().write(text)

    monkeypatch.setattr("mlx_resonance.cli.dialogue.printer", Broken)
    monkeypatch.setattr(conversation.engine, "stream", fail_once)
    with caplog.at_level(logging.DEBUG, "mlx_resonance"):
        typed(monkeypatch, dialogue, "/save a\0b", "def f():", "import sys", "import re")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: no path has a NUL character in it"
    assert said[1] == "error: RuntimeError: [metal] out of memory"
    assert said[2] == "error: LookupError: no such style"
    assert [turn.question for turn in conversation.turns] == ["import os", "import sys", "import re"]
    assert asked[0] > 0 and asked[1] == 0  # the cache may be broken
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("failure", [KeyboardInterrupt, DeviceError("the GPU gave up")])
def test_a_file_that_fails_leaves_no_trace(
    loaded: Any, failure: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("import re " * 80)
    dialogue = dialogue_of(loaded, overflow="drop-oldest", context=256, max_tokens=2)
    conversation = dialogue.conversation
    for number in range(4):
        ask(conversation, f"{number} " + "import re " * 8)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(conversation.engine, "read", fail)
    typed(monkeypatch, dialogue, f"/file {tmp_path / 'file.txt'}")
    assert len(conversation.turns) == 4 and conversation.files == []
    err = capsys.readouterr().err
    assert "is not part of the conversation" in err or "error: the GPU gave up" in err
    assert "dropped" not in err


def test_a_complete_answer_was_not_stopped(loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    dialogue = dialogue_of(loaded, max_tokens=3)
    answer = dialogue.conversation.answer

    def interrupted(*arguments: Any) -> Any:
        for response in answer(*arguments):
            dialogue.interrupts.asked = response.finish_reason is not None
            yield response

    monkeypatch.setattr(dialogue.conversation, "answer", interrupted)
    typed(monkeypatch, dialogue, "import os")
    err = capsys.readouterr().err
    assert "cut at 3 tokens" in err and "stopped" not in err


def test_no_empty_lines_where_no_bar_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=False)
    monkeypatch.setattr(terminal, "progress_bar", lambda: Progress(console=console, transient=True))
    for tokens, lines in ((10, 0), (10_000, 1)):
        with Reading("prompt", Interrupts()) as reading:
            reading(0, tokens)
            for _ in range(5):  # once for every token of an answer
                reading.stop()
        assert out.getvalue().count("\n") == lines


def test_a_terminal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = os.openpty()
    with open(mine, "rb"), open(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for echo in (True, False):
            settings = termios.tcgetattr(stdin)
            settings[3] = settings[3] | termios.ECHO if echo else settings[3] & ~termios.ECHO
            termios.tcsetattr(stdin, termios.TCSANOW, settings)
            before = termios.tcgetattr(stdin)
            with contextlib.suppress(SystemExit), Interrupts().working():
                assert not termios.tcgetattr(stdin)[3] & termios.ECHO
                raise SystemExit
            assert termios.tcgetattr(stdin) == before


def test_signals_end_a_command_cleanly() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored here, as after nohup
    try:
        with pytest.raises(SystemExit) as left, ended_by(signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
        assert left.value.code == 128 + signal.SIGHUP and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as after nohup
        with ended_by(signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lines_are_wrapped_at_words(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, highlight=False, markup=False)
    monkeypatch.setattr(engine, "stderr", console)
    monkeypatch.setattr(errors, "stderr", console)
    options: dict[str, Any] = {"kv_bits": None, "prefill_step_size": 512, "memory": None, "force": False}
    kept: dict[str, Any] = {"prompt_cache": None, "prompt_cache_size": None, "no_prompt_cache": True}
    engine.plan_engine(Checkpoint.open(checkpoint), context=256, **options, **kept)
    changing: Any = SimpleNamespace(rope=SimpleNamespace(depends_on_length=True, rope_type="dynamic"))
    assert engine.open_cache(changing, None, None, 10) is None
    warnings = errors._Warnings(SimpleNamespace(params=[]))
    warnings.emit(logging.makeLogRecord({"msg": "a warning of :warning: several words, [more] than a line holds"}))
    words = out.getvalue().split()
    assert all(len(line) <= 40 for line in out.getvalue().splitlines()) and "256 tokens of context" in " ".join(words)
    assert "no KV cache on disk: the angles of dynamic change with the length of a text" in " ".join(words)
    assert "warning: a warning of :warning: several words, [more] than a line holds" in " ".join(words)


def test_history_is_private_and_never_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "data" / "chat-history"
    History(path).store_string("one\ntwo")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    History(path).store_string("three")
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(History(path).load_history_strings()) == ["three", "one\ntwo"]
    for wrong in (tmp_path, path / "below"):
        History(wrong).store_string("x")
        assert list(History(wrong).load_history_strings()) == []


def test_history_does_not_grow_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LONGEST_HISTORY", 8)
    path = tmp_path / "chat-history"
    for number in range(9):
        History(path).store_string(f"{number}\nmore")
    assert list(History(path).load_history_strings()) == ["8\nmore", "7\nmore"]  # whole ones
    assert len(path.read_bytes().splitlines()) == 7 and path.stat().st_mode & 0o777 == 0o600
    History(path).store_string("last")
    assert next(iter(History(path).load_history_strings())) == "last"
