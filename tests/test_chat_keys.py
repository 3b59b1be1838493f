"""A person at a terminal, a real one: Ctrl-C, Ctrl-D, signals."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from .test_conversation import TEMPLATE


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


PATIENT = """
import sys, time
from mlx_resonance import cli
from mlx_resonance.generation.conversation import Conversation
answer = Conversation.answer
def patiently(self, question, progress):
    def wait():
        print("waiting", file=sys.stderr, flush=True)
        while not progress.interrupts.asked:
            time.sleep(0.01)
    def read(done, total):
        if question.text == "read":
            wait()
        progress(done, total)
    for response in answer(self, question, read):
        yield response
        if response.generation_tokens == 3:
            wait()
Conversation.answer = patiently
cli.main()
"""


class Person:
    """Someone at a terminal who types and reads."""

    def __init__(self, *arguments: object, code: str, **environment: str) -> None:
        self.terminal, theirs = os.openpty()
        names = {"TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | names, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        self.name = os.ttyname(theirs)
        os.close(theirs)
        self.shown = ""

    def sees(self, words: str) -> None:
        """Read until these words."""
        start = time.monotonic()
        while words not in self.shown:
            assert time.monotonic() < start + 60 and select.select([self.terminal], [], [], 60)[0], self.shown
            piece = b""
            with contextlib.suppress(OSError):  # the end, on Linux
                piece = os.read(self.terminal, 4096)
            assert piece, self.shown
            self.shown += piece.decode(errors="replace")
        self.shown = self.shown.partition(words)[2]

    def types(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def presses(self, key: str, words: str) -> None:
        """Press a key, again until these words appear: the terminal may not be in raw mode yet."""
        while words not in self.shown:
            self.types(key)
            while select.select([self.terminal], [], [], 1)[0]:
                self.shown += os.read(self.terminal, 4096).decode(errors="replace")
        self.shown = self.shown.partition(words)[2]

    def leaves(self) -> int:
        """Ctrl-D, again until it is read: a terminal that is not in raw mode yet takes it. Returns the exit code."""
        with contextlib.suppress(OSError):
            while self.process.poll() is None:
                self.types("\x04")
                if select.select([self.terminal], [], [], 1)[0]:
                    os.read(self.terminal, 4096)
        code = self.process.wait(60)
        os.close(self.terminal)
        return code


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(folder: Path, tmp_path: Path) -> None:
    command = ["chat", "-m", folder, "--no-prompt-cache"]
    person = Person(*command, code=PATIENT, XDG_DATA_HOME=str(tmp_path), HOME=str(tmp_path))
    for question, then in {
        "read": "stopped: the question is dropped, what was read of it stays in the cache",
        "import argparse": "stopped: the conversation keeps what was written",
    }.items():
        person.sees(" of 512 tokens > ")
        person.types(f"{question}\r")
        person.sees("waiting")
        person.types("\x03")
        person.sees(then)
    person.sees(" of 512 tokens > ")
    person.presses("\x03", "Ctrl-D leaves")
    person.types("/fiel\r")
    person.sees("error: /fiel is not a command")
    person.types(f"/save {tmp_path}/talk.json\r")
    person.sees("wrote")
    person.sees(" of 512 tokens > ")
    assert person.leaves() == 0
    question, answer = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert question["content"] == "import argparse" and answer["content"]
    (history,) = tmp_path.rglob("chat-history")
    assert "+import argparse" in history.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_a_signal_leaves_the_terminal_as_it_was(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = ["chat", "-m", folder, "--no-prompt-cache"]
    person = Person(*command, code=PATIENT, XDG_DATA_HOME=str(tmp_path), HOME=str(tmp_path))
    with open(person.name) as theirs:
        person.sees(" of 512 tokens > ")
        if number == signal.SIGTERM:  # during an answer; the other one while a line is typed
            person.types("import argparse\r")
            person.sees("waiting")
            assert not termios.tcgetattr(theirs)[3] & termios.ECHO
        os.kill(person.process.pid, number)
        assert person.process.wait(60) == 128 + number
        settings = termios.tcgetattr(theirs)
        assert settings[3] & termios.ECHO and settings[3] & termios.ICANON
    os.close(person.terminal)
