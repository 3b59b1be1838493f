"""Exact float32 products: the process that compares logits where MLX may use TF32, its errors and its end."""

from __future__ import annotations

import builtins
import json
import logging
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx_resonance.float32 as float32
from mlx_resonance.convert import convert, verify
from mlx_resonance.convert.verify import VerificationError
from mlx_resonance.errors import UsageError, check_option
from mlx_resonance.float32 import SWITCH, in_float32, may_use_tf32

import mlx.core as mx
import pytest

VERIFY = sys.modules["mlx_resonance.convert.verify"]  # the function has the same name
TORCH = str(Path(__file__).with_name("without_torch"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """As on a GPU with TF32; the processes that were started."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(float32, "may_use_tf32", lambda: True)
    monkeypatch.setattr(float32.subprocess, "Popen", start)
    monkeypatch.setenv(SWITCH, "1")
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part != TORCH]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))  # with torch, as in this process
    return started


def test_the_tests_compute_without_tf32() -> None:
    assert os.environ[SWITCH] == "0"  # conftest.py says if it was too late
    assert subprocess.run(["sh", "-c", f"echo ${SWITCH}"], capture_output=True, text=True).stdout == "0\n"


@pytest.mark.gpu
def test_products_are_exact_on_this_gpu() -> None:
    a = mx.full((256, 256), 1 + 2.0**-20)
    assert (a @ mx.eye(256) == a).all().item()


@pytest.mark.metal
def test_products_are_exact_on_this_mac() -> None:
    test_products_are_exact_on_this_gpu()


def test_when_a_process_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, switch, needed in (
        (mx.cpu, None, False), (mx.gpu, None, True), (mx.gpu, "1", True), (mx.gpu, "0", False), (mx.cpu, "1", False),
    ):  # fmt: skip
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        monkeypatch.setenv(SWITCH, switch or "")
        if switch is None:
            monkeypatch.delenv(SWITCH)
        assert may_use_tf32() == needed, (device, switch)


def test_none_is_started_where_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(float32.subprocess, "Popen", None)
    assert in_float32(os.getpid) == os.getpid()


def test_its_environment_and_path(elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pickle.py").write_text("raise ValueError('not this one')")
    monkeypatch.chdir(tmp_path)
    assert in_float32(os.getenv, SWITCH) == "0" and os.environ[SWITCH] == "1"
    assert in_float32(eval, "__import__('sys').path") == sys.path
    assert in_float32(os.getpid) == elsewhere[-1].pid != os.getpid()


def test_what_it_prints_and_logs(
    elsewhere: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert in_float32(builtins.print, "a line") is None
    assert in_float32(os.write, 1, b"another\n") == 8
    assert in_float32(exec, "import logging; logging.getLogger('mlx_resonance.x').warning('%s!', 'now')") is None
    out, err = capfd.readouterr()
    assert out == "" and err == "a line\nanother\n"
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("mlx_resonance.x", "now!")]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("work", "arguments", "kind", "said"),
    [
        (check_option, ("bits", False, "4", 3), UsageError, "bits must be 4, got 3"),
        (json.loads, ("{",), json.JSONDecodeError, "Expecting property name"),
        (math.sqrt, (-1,), ValueError, "nonnegative|domain"),
        (exec, ("class E(Exception): pass\nraise E('odd')",), RuntimeError, "E: odd"),
    ],
)
def test_its_errors_are_raised_here(
    elsewhere: Any, capfd: pytest.CaptureFixture[str], work: Any, arguments: Any, kind: Any, said: str
) -> None:
    with pytest.raises(kind, match=said) as raised:
        in_float32(work, *arguments)
    assert "Traceback" in str(raised.value.__cause__) and capfd.readouterr() == ("", "")
    if isinstance(raised.value, UsageError):
        assert raised.value.option == "bits"


@pytest.mark.parametrize(
    ("code", "exit_code"), [("os._exit(0)", 0), ("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", -9)]
)
def test_one_that_dies(elsewhere: Any, code: str, exit_code: int) -> None:
    with pytest.raises(ChildProcessError, match=f"exit code {exit_code}"):
        in_float32(exec, f"import os; {code}")


def test_one_that_cannot_begin(elsewhere: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(ChildProcessError, match="exit code 1"):
        in_float32(len, "x" * 10**6)  # more than a pipe holds


@pytest.mark.long
def test_the_same_verification(elsewhere: Any, random_llama: Path, tmp_path: Path) -> None:
    done = convert(random_llama, tmp_path / "out", rope="yarn", factor=8, quantize=True, verify=True)
    assert len(elsewhere) == 1 and elsewhere[0].returncode == 0
    later = verify(tmp_path / "out", random_llama)
    assert len(elsewhere) == 2 and done.checks == later.to_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float32, "may_use_tf32", lambda: False)
        here = verify(tmp_path / "out", random_llama)
    assert len(elsewhere) == 2 and isinstance(here.logits, dict)
    assert later.to_dict() == here.to_dict()


def test_none_is_started_to_say_that_nothing_can_be_compared(
    elsewhere: Any, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_resonance.convert.reference.MEMORY", 1e3)
    done = convert(random_llama, tmp_path / "out", verify=True)
    assert done.checks is not None and "GB" in done.checks["logits"] and elsewhere == []


@pytest.mark.long
def test_the_commands(elsewhere: Any, run: Any, random_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run("convert", random_llama, "--mlx-path", out, "--verify", "--json")
    checks = json.loads(stdout)["checks"]
    assert code == 0 and stdout.count("\n") == 1 and checks["logits"]["layers"] == 2 and len(elsewhere) == 1
    assert "logits of transformers within" in stderr and "Traceback" not in stderr
    code, stdout, _ = run("verify", out, "--source", random_llama, "--json")
    assert code == 0 and len(elsewhere) == 2 and json.loads(stdout) == {"path": str(out), **checks}


def test_a_problem_found_there_is_one_line(
    elsewhere: Any, run: Any, random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(random_llama, tmp_path / "out")
    for work, said in (
        (lambda *_: in_float32(check_option, "logits", False, "near", "far"), "problem: logits must be near, got far"),
        (lambda *_: in_float32(exec, "import os; os._exit(9)"), "error: the process that computes in float32"),
    ):
        monkeypatch.setattr(VERIFY, "compare_logits", work)
        code, stdout, stderr = run("verify", tmp_path / "out")
        assert (code, stdout, stderr.count("\n")) == (1, "", 1) and said in stderr, stderr


def test_a_conversion_whose_comparison_fails_is_not_published(
    elsewhere: Any, random_llama: Path, tmp_path: Path
) -> None:
    def dies(*_: Any) -> None:
        in_float32(exec, "import os; os._exit(9)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VERIFY, "compare_logits", dies)
        with pytest.raises(ChildProcessError):
            convert(random_llama, tmp_path / "out", verify=True)
        patch.setattr(VERIFY, "compare_logits", lambda _: {"error": 1.0, "tokens": 1, "layers": 1})
        with pytest.raises(VerificationError, match="logits are off"):
            convert(random_llama, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()


SLEEPER = "import os, pathlib, time; pathlib.Path({path!r}).write_text(str(os.getpid())); time.sleep(600)"
PARENT = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & has it ignored
import mlx_resonance.float32 as float32, mlx_resonance.convert.reference as reference
float32.may_use_tf32 = lambda: True
reference.in_float32 = lambda *_: float32.in_float32(runpy.run_path, {script!r})
sys.argv = ["mlx-resonance", "verify", {folder!r}, "--json"]
from mlx_resonance.cli import main
main()
"""


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGINT, True),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.long),
    ],
)
def test_it_ends_with_the_command(
    elsewhere: Any, random_llama: Path, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    convert(random_llama, tmp_path / "out")
    told, script = tmp_path / "pid", tmp_path / "sleeper.py"
    script.write_text(SLEEPER.format(path=str(told)))
    code = PARENT.format(script=str(script), folder=str(tmp_path / "out"))
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    try:
        while not (told.exists() and told.read_text()):
            assert command.poll() is None and time.monotonic() < deadline, command.communicate()
            time.sleep(0.05)
        pid = int(told.read_text())
        assert alive(pid)
        os.killpg(command.pid, number) if group else os.kill(command.pid, number)
        out, err = command.communicate(timeout=60)
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        command.kill()
        command.communicate()
    assert out == ""
    if number == signal.SIGINT:
        assert command.returncode == 130 and err.splitlines()[-1] == "error: interrupted" and "Traceback" not in err


def test_an_interrupt_in_a_notebook(elsewhere: Any, tmp_path: Path) -> None:
    """The kernel's process alone is interrupted; afterwards everything still works."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    told, script = tmp_path / "pid", tmp_path / "sleeper.py"
    script.write_text(SLEEPER.format(path=str(told)) + "\n")
    waiting = f"until [ -s {told} ]; do sleep 0.05; done; kill -INT {os.getpid()}"
    shell = os.posix_spawnp("sh", ["sh", "-c", waiting], os.environ)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_float32(runpy.run_path, str(script))
    finally:
        signal.signal(signal.SIGINT, before)
        os.kill(shell, signal.SIGKILL)
        os.waitpid(shell, 0)
    assert not alive(int(told.read_text()))
    assert in_float32(len, "four") == 4
