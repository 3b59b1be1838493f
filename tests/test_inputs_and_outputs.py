"""What every command refuses: empty paths, outputs that are not files, numbers out of range. It walks the app."""

from __future__ import annotations

import collections.abc
import errno
import inspect
import itertools
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlx_resonance import Checkpoint, cli, load
from mlx_resonance.cli import prompts
from mlx_resonance.convert import convert, verify
from mlx_resonance.files import user_path
from mlx_resonance.finetuning import finetune
from mlx_resonance.finetuning.data import data_files
from mlx_resonance.generation import PromptCache
from mlx_resonance.generation.batch import open_answers
from mlx_resonance.plots import image_path
from mlx_resonance.run_log import RunLog, read_run_log
from mlx_resonance.storage import atomic_file, check_new_folder, check_output, check_output_folder

import pytest
import typer
from matplotlib.figure import Figure

from .test_errors import COMMANDS

APP = typer.main.get_command(cli.app)  # once, not for every command line
MODELS = {"model", "src", "source", "draft_model", "evaluator"}  # strings that name a folder or a model of the hub
OTHER_STRINGS = {
    "prompt", "field", "file", "rope", "revision", "tasks", "subtask", "arithmetic", "encoding", "preset", "split",
    "api_key", "extend", "host", "stop", "system_prompt", "weights",
}  # fmt: skip
OUTPUTS = {"output", "plot", "mlx_path", "prompt_cache", "log_samples"}


class Parameter(NamedTuple):
    """A parameter of a command: how it is declared in the signature, and what Typer makes of it."""

    command: str
    name: str
    kind: Any
    info: Any
    flag: str | None

    def arguments(self, value: str) -> list[str]:
        """The command line that gives it this value, and nothing else."""
        return [*self.command.split(), *([self.flag] if self.flag else []), value]


def scalar(kind: Any) -> Any:
    """int of `Annotated[Sequence[int] | None, …]`."""
    if typing.get_origin(kind) in (typing.Annotated, typing.Union, types.UnionType, list, collections.abc.Sequence):
        return scalar(next(part for part in typing.get_args(kind) if part is not types.NoneType))
    return kind


def parameters() -> Iterator[Parameter]:
    for name, command in COMMANDS.items():
        flags = {parameter.name: parameter.opts for parameter in command.params}
        hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        for key, kind in hints.items():
            if key in flags:
                long = [flag for flag in flags[key] if flag.startswith("--")]
                yield Parameter(name, key, scalar(kind), kind.__metadata__[0], long[0] if long else None)


PARAMETERS = list(parameters())
PATHS = [p for p in PARAMETERS if p.kind is Path or p.name in MODELS]
NUMBERS = [p for p in PARAMETERS if p.kind in (int, float)]


def label(parameter: Parameter) -> str:
    return f"{parameter.command} {parameter.name}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder. What waits for the other end of a pipe is interrupted instead of hanging."""

    def interrupt(*_: object) -> None:
        raise AssertionError("it waits")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "app", APP)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_every_parameter_is_known() -> None:
    assert len(PATHS) > 30 and len(NUMBERS) > 60
    assert {p.name for p in PARAMETERS if p.kind is str} == MODELS | OTHER_STRINGS
    assert {p.name for p in PARAMETERS if p.name in OUTPUTS} == OUTPUTS


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("parameter", PATHS, ids=label)
def test_no_command_takes_an_empty_path(run: Any, tmp_path: Path, parameter: Parameter, value: str) -> None:
    code, out, err = run(*parameter.arguments(value))
    assert (code, out, err.count("\n")) == (2, "", 1) and "is empty" in err, err
    assert (parameter.flag or parameter.info.metavar) in err
    assert not list(tmp_path.iterdir())


EMPTY: dict[str, Callable[[str, Path], Any]] = {
    "user_path": lambda empty, model: user_path(empty),
    "load": lambda empty, model: load(empty),
    "Checkpoint.open": lambda empty, model: Checkpoint.open(empty),
    "convert from": lambda empty, model: convert(empty, "out"),
    "convert to": lambda empty, model: convert(model, empty),
    "convert, report": lambda empty, model: convert(model, "out", quantize=True, quant_report=empty),
    "verify": lambda empty, model: verify(empty),
    "finetune": lambda empty, model: finetune(empty, "data", "out"),
    "finetune on": lambda empty, model: finetune(model, empty, "out", force=True),
    "finetune to": lambda empty, model: finetune(model, "data", empty),
    "data_files": lambda empty, model: data_files(empty),
    "RunLog": lambda empty, model: RunLog(empty, "some", {}, key=("id",)),
    "PromptCache": lambda empty, model: PromptCache(empty, "key"),
    "image_path": lambda empty, model: image_path(empty),
    "open_answers": lambda empty, model: open_answers(empty, [], {}, "model"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("name", EMPTY)
def test_no_function_takes_an_empty_path(tmp_path: Path, stdlib_llama: Path, name: str, empty: str) -> None:
    (tmp_path / "a.txt").write_text("import os\n" * 1000)  # what `finetune` would find in the current folder
    with pytest.raises(ValueError, match="empty"):
        EMPTY[name](empty, stdlib_llama)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_current_folder_can_be_meant() -> None:
    assert user_path(".") == Path()
    Path("a.txt").write_text("import os\n")
    assert data_files(".")[0] == [Path("a.txt")]
    with pytest.raises(FileExistsError, match=r"^\. is a folder"):
        RunLog(Path(""), "some", {}, key=("id",))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # the whole path may be too long


KINDS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "not a folder": lambda path: None,  # the folder above is a file
}
# The model does not exist: an output is refused before it is opened. Other inputs exist.
TO_FILES = {
    "generate output": "-m none --prompts-file in.jsonl --output",
    "inspect plot": "none --plot",
    "eval perplexity output": "-m none --data in.txt --contexts 300 --output",
    "eval perplexity plot": "-m none --data in.txt --contexts 300 --output new.jsonl --plot",
    "eval passkey output": "-m none --lengths 300 --output",
    "eval passkey plot": "-m none --lengths 300 --output new.jsonl --plot",
    "eval leval output": "-m none --data in.jsonl --output",
    "eval harness output": "-m none --tasks none --output",
    "eval harness log_samples": "-m none --tasks none --log-samples",
    "posgen data output": "--subtask cot --output",
    "posgen sweep output": "--preset smoke --output",
    "posgen report plot": "in.jsonl --plot",
}
TO_FOLDERS = {
    "convert mlx_path": "none --mlx-path",
    "demo mlx_path": "-m none --mlx-path",
    "finetune mlx_path": "-m none --data in.txt --mlx-path",
    "generate prompt_cache": "-m none --prompt a --prompt-cache",
    "chat prompt_cache": "-m none --prompt-cache",
    "server prompt_cache": "-m none --port 0 --prompt-cache",
    "cache add prompt_cache": "-m none in.txt --prompt-cache",
    "posgen train output": "--subtask cot --encoding rope --preset smoke --output",
}
KINDS_OF_FOLDERS = {kind for kind in KINDS if kind != "a folder"}


def test_every_output_is_tried() -> None:
    assert {*TO_FILES, *TO_FOLDERS} == {label(p) for p in PARAMETERS if p.name in OUTPUTS}


@pytest.mark.parametrize(
    ("output", "kind"), [*itertools.product(TO_FILES, KINDS), *itertools.product(TO_FOLDERS, sorted(KINDS_OF_FOLDERS))]
)
def test_an_output_that_cannot_be_written_is_refused_first(run: Any, tmp_path: Path, output: str, kind: str) -> None:
    for name in ("in.jsonl", "in.txt"):
        (tmp_path / name).write_text("{}\n")
    path = tmp_path / ("out.png" if output.endswith("plot") else "out")
    if kind == "not a folder":
        path = tmp_path / "in.txt" / path.name
    KINDS[kind](path)
    before = sorted(tmp_path.rglob("*"))
    arguments = shlex.split((TO_FILES | TO_FOLDERS)[output])
    code, out, err = run(*output.split()[:-1], *arguments, path)
    assert (code, out, err.count("\n")) == (2, "", 1) and str(path) in err, err
    assert kind in err
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_of_python(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    checks = (check_output, partial(check_output_folder, option="output"), check_new_folder)
    for check in (*checks, partial(RunLog, kind="some", settings={}, key=("id",))):
        with pytest.raises(FileExistsError, match="pipe is a named pipe"):
            check(tmp_path / "pipe")  # type: ignore[operator]
        with pytest.raises(NotADirectoryError, match=r"out cannot be written: .*pipe is not a folder"):
            check(tmp_path / "pipe" / "out")  # type: ignore[operator]
    with pytest.raises(FileExistsError, match="file is a file: expected a folder"):
        (tmp_path / "file").touch()
        check_output_folder(tmp_path / "file", "output")


def test_an_output_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # for root, all is allowed
    for check in (check_output, partial(check_output_folder, option="output"), check_new_folder):
        with pytest.raises(PermissionError, match="new/out cannot be written: no permission"):
            check(tmp_path / "new" / "out")  # type: ignore[operator]


INPUTS = {
    "generate": "-m {model} --output new.jsonl --prompts-file",
    "convert": "{model} --mlx-path new -q --quant-report",
    "finetune": "-m {model} --mlx-path new --data",
    "eval perplexity": "-m {model} --contexts 300 --output new.jsonl --data",
    "eval leval": "-m {model} --output new.jsonl --data",
    "posgen report": "",
}


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
@pytest.mark.parametrize("command", INPUTS)
def test_an_input_that_may_never_end_is_refused(
    run: Any, tmp_path: Path, stdlib_llama: Path, command: str, kind: str
) -> None:
    KINDS[kind](tmp_path / "in.txt")
    arguments = shlex.split(INPUTS[command].format(model=stdlib_llama))
    code, out, err = run(*command.split(), *arguments, tmp_path / "in.txt")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"in.txt is {kind}: a file is needed" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_run_log_to_read_may_not_be_a_pipe(run: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match=r"run\.jsonl is not a run log of posgen results: it is a named pipe"):
        read_run_log(tmp_path / "run.jsonl", "posgen")
    code, _, err = run("posgen", "eval", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "it is a named pipe" in err


def test_a_prompt_may_come_from_a_pipe_that_ends(
    run: Any, tmp_path: Path, stdlib_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    options = ("generate", "-m", stdlib_llama, "--max-tokens", 2)
    writer = threading.Thread(target=pipe.write_text, args=("import os\n",))
    writer.start()
    code, text, _ = run(*options, "--prompt-file", pipe)
    writer.join()
    assert code == 0 and text == run(*options, "--prompt", "import os\n")[1]
    monkeypatch.setattr(prompts, "LARGEST_PROMPT", 1000)
    code, _, err = run(*options, "--prompt-file", "/dev/zero")
    assert code == 2 and err.count("\n") == 1 and "more than 1000 bytes (--prompt-file)" in err
    assert "more than 1000 bytes" in run(*options, stdin="a" * 1001)[2]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """What NumPy and Python raise when a file cannot grow."""
    command = [
        Path(sys.executable).with_name("mlx-resonance"),
        *shlex.split("posgen data --subtask cot --output a.npy"),
    ]
    for size in (10_000, 10):  # in the middle of the numbers, and in the header
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.count("a.npy cannot be written") == done.stderr.count("cannot be written") == 1
    with pytest.raises(OSError, match=r"^b\.txt cannot be written \(No space left on device\)$"):
        with atomic_file(Path("b.txt")) as path, path.open("w") as file:
            file.write("some")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_figure(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(*shlex.split("posgen sweep --preset smoke --seeds 1 --subtask cot --encoding rope --output a.jsonl"))
    monkeypatch.setattr(Figure, "savefig", full)
    code, out, err = run("posgen", "report", "a.jsonl", "--plot", "a.png")
    assert (code, out, err) == (1, "", "error: a.png cannot be written (No space left on device)\n")


def bounds(parameter: Parameter) -> tuple[str, str]:
    """The least and the largest value, as they are given and shown."""
    info = parameter.info
    if info.parser is None:
        return str(info.min), str(info.max)
    if info.metavar == "8|4":
        return "4", "8"
    low, high = re.fullmatch(r"(.+)\.\.(.+?)(?:,…)?", info.metavar).groups()  # type: ignore[union-attr]
    return low, high


def beyond(parameter: Parameter) -> list[str]:
    low, high = bounds(parameter)
    if high.endswith("TB"):
        return ["0.9KB", f"{int(high[:-2]) + 1}TB", "999999999TB", "0KB", "nan"]
    if parameter.kind is float:
        return [str(float(low) - 0.5), str(float(high) * 1.001), "nan", "inf", "-inf", "1e400"]
    wrong = [str(int(low) - 1), str(int(high) + 1), "nan", "9" * 30]
    return wrong + ([f"{low},{int(high) + 1}"] if parameter.info.metavar and "," in parameter.info.metavar else [])


# The library checks lists of numbers: their commands need what else is required.
LISTS = {
    "eval passkey": "-m none --output new.jsonl --lengths 300",
    "eval perplexity": "-m none --output new.jsonl --data in.txt",
    "eval harness": "-m none --tasks mrcr",
}


@pytest.mark.parametrize("parameter", NUMBERS, ids=label)
def test_every_number_has_bounds_that_the_help_shows(run: Any, parameter: Parameter) -> None:
    low, high = bounds(parameter)
    assert "None" not in (low, high)
    code, out, _ = run(*parameter.command.split(), "--help")
    entries = re.split(r"\n  (?=-)", out)
    (entry,) = [entry for entry in entries if re.search(rf"{parameter.flag}(?![\w-])", entry.split("  ")[0])]
    shown = "".join(entry.split())
    if parameter.info.parser is None:
        assert code == 0 and f"{low}<=x<={high}" in shown
    else:
        assert code == 0 and parameter.info.metavar in shown
    for value in beyond(parameter):
        others = LISTS[parameter.command] if "," in str(parameter.info.metavar) else ""
        code, out, err = run(*parameter.command.split(), *others.split(), parameter.flag, value)
        assert (code, out, err.count("\n")) == (2, "", 1) and parameter.flag in err, (value, err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval passkey --lengths 300,400 --depths {hundred} --repetitions 10000", "at most 4950, which are a million"),
        ("eval passkey --lengths {thousand},1001", "'--lengths': expected at most 1000 integers, got 1001"),
    ],
)
def test_a_grid_is_not_too_large(run: Any, arguments: str, words: str) -> None:
    numbers = {"hundred": range(101), "thousand": range(1, 1001)}
    lists = {name: ",".join(map(str, values)) for name, values in numbers.items()}
    code, out, err = run(*arguments.format(**lists).split(), "-m", "none", "--output", "new.jsonl")
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err
