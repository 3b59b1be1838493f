"""Wired memory: every command that runs a model sets the limit once and restores it; stdout has nothing of it."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_resonance import generate, load, stream_generate
from mlx_resonance.generation import Engine
from mlx_resonance.generation.batch import Request, generate_batch
from mlx_resonance.generation.sampling import Sampling
from mlx_resonance.posgen.model import Decoder
from mlx_resonance.server.worker import Work, Worker
from mlx_resonance.wired import wired

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generation_stream, wired_limit
from mlx_lm.models.llama import LlamaModel

from .checkpoints import prompt, source
from .test_chat import folder as chat_model  # noqa: F401  # a fixture
from .test_evaluation_run_logs import COMMANDS as EVALUATIONS
from .test_evaluation_run_logs import TASK, folder  # noqa: F401  # the latter a fixture: files for all evaluations

BEFORE = 5  # the limit before any work, in bytes
TINY = 10**6  # what this Mac recommends: less than the weights


class Mac:
    """Metal's part of MLX: a limit, how it changed, and what was waited for."""

    def __init__(self) -> None:
        self.limit, self.changes, self.waits = BEFORE, list[int](), list[Any]()

    def set_wired_limit(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        if limit != before:
            self.changes.append(limit)
        return before

    def once(self) -> bool:
        """Whether one piece of work set it and restored it, since the last call."""
        changes, self.changes = self.changes, []
        return changes == [TINY, BEFORE] and self.limit == BEFORE


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    found, info, wait = Mac(), mx.device_info(), mx.synchronize
    monkeypatch.setattr(mx, "device_info", lambda *_: info | {"max_recommended_working_set_size": TINY})
    monkeypatch.setattr(mx, "set_wired_limit", found.set_wired_limit)
    monkeypatch.setattr(mx, "synchronize", lambda *streams: found.waits.append(streams) or wait(*streams))
    return found


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=4)


POSGEN = "--subtask cot --encoding yarn --preset smoke"
RUNS = {
    "generate": "generate -m MODEL -p import --max-tokens 3 --force --json",
    "generate, KV cache on disk": "generate -m MODEL -p import --max-tokens 3 --force --json --prompt-cache OUT/kept",
    "generate, many": "generate -m MODEL --prompts-file OUT/prompts --output OUT/log --max-tokens 3 --force --json",
    "cache add": "cache add -m MODEL OUT/text --prefill-step-size 32 --prompt-cache OUT/kept --force --json",
    "finetune": "finetune -m MODEL --data OUT/data --mlx-path OUT/new --length 32 --steps 2 --force --json",
    "posgen train": f"posgen train {POSGEN} --output OUT/run --json",
    "posgen sweep": f"posgen sweep {POSGEN} --seeds 2 --output OUT/log --json",
} | {
    f"eval {name}": f"eval {name} {options} --output OUT/log --model MODEL --force --json"
    for name, options in EVALUATIONS.items()
}
for name, one, two in (  # work that has several pieces
    ("passkey", "--repetitions 1", "--repetitions 2"),
    ("leval", "coursera.jsonl", "OUT/coursera.jsonl"),
    ("harness", "--include-path tasks", "--include-path OUT"),
):
    assert one in RUNS[f"eval {name}"]
    RUNS[f"eval {name}"] = RUNS[f"eval {name}"].replace(one, two)
OF_A_SMALL_MODEL = ("posgen train", "posgen sweep")
UNWARNED = (*OF_A_SMALL_MODEL, "eval perplexity")  # its plan says whether the model fits


@pytest.fixture
def command(run: Any, checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """command(line) -> exit code, stdout, stderr; among the files that the commands need."""
    monkeypatch.chdir(folder)
    text = source()[:600]
    (tmp_path / "text").write_text(text)
    (tmp_path / "prompts").write_text("".join(json.dumps({"id": i, "prompt": f"{text} {i}"}) + "\n" for i in range(3)))
    questions = {"input": "A text.", "instructions": ["Q?", "R?"], "outputs": ["A", "B"], "evaluation": "exam"}
    (tmp_path / "coursera.jsonl").write_text(json.dumps(questions) + "\n")
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data" / "train.jsonl", cache=tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": text[start:]}) + "\n" for start in (0, 5)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines))

    def command(line: str) -> tuple[int, str, str]:
        words = (word.replace("OUT", str(tmp_path)) for word in line.split())
        return run(*(str(checkpoint) if word == "MODEL" else word for word in words))

    return command


@pytest.mark.parametrize("name", RUNS)
def test_a_command_wires_once_and_prints_one_object(mac: Mac, command: Any, name: str) -> None:
    code, out, err = command(RUNS[name])
    assert code == 0, err
    assert isinstance(json.loads(out), dict) and out.count("\n") == 1
    assert mac.once()
    assert err.count("the weights take") == (name not in UNWARNED) and "[WARNING]" not in out + err


@pytest.mark.parametrize(
    "name",
    [name if number % 4 == 0 else pytest.param(name, marks=pytest.mark.long) for number, name in enumerate(RUNS)],
)
def test_a_command_that_fails_restores_the_limit(
    mac: Mac, command: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        assert mac.limit == TINY
        raise OSError("half-way")

    monkeypatch.setattr(Decoder if name in OF_A_SMALL_MODEL else LlamaModel, "__call__", broken)
    code, out, err = command(RUNS[name])
    assert (code, out) == (1, "") and "error: half-way" in err
    gc.collect()
    assert mac.once()


def test_posgen_eval(mac: Mac, command: Any) -> None:
    assert command(RUNS["posgen train"])[0] == 0 and mac.once()
    code, out, _ = command("posgen eval --model OUT/run --json")
    assert code == 0 and isinstance(json.loads(out), dict) and mac.once()


def test_a_conversion_wires_nothing(mac: Mac, command: Any) -> None:
    """It uses each weight once: --verify in one pass over 64 tokens, the report a layer at a time."""
    code, out, err = command("convert MODEL --mlx-path OUT/new -q --verify --quant-report OUT/text --json")
    assert code == 0, err
    assert json.loads(out)["checks"]["problems"] == [] and mac.changes == []


def test_chat_wires_once_for_each_answer(mac: Mac, run: Any, chat_model: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "text").write_text(source()[:300])
    options = ("--no-prompt-cache", "--max-tokens", 3, "--force", "-f", tmp_path / "text")
    code, _, err = run("chat", "-m", chat_model, *options, stdin="import os\nimport re\n")
    assert code == 0, err
    assert mac.changes == [TINY, BEFORE] * 3 and mac.limit == BEFORE  # the file, and two answers


PYTHON: dict[str, Callable[[Any, Any], Any]] = {
    "stream_generate": lambda loaded, tokens: list(stream_generate(*loaded, tokens, max_tokens=3)),
    "on another stream": lambda loaded, tokens: list(
        stream_generate(*loaded, tokens, max_tokens=3, stream=mx.new_stream(mx.default_device()))
    ),
    "generate": lambda loaded, tokens: generate(*loaded, tokens, max_tokens=3),
    "Engine.stream": lambda loaded, tokens: list(Engine(*loaded).stream(tokens, 3)),
    "Engine.read": lambda loaded, tokens: Engine(*loaded).read(tokens),
    "the server": lambda loaded, tokens: serve(Worker(Engine(*loaded)), tokens),
    "generate_batch": lambda loaded, tokens: list(generate_batch(*loaded, requests(tokens), max_tokens=3)),
}


def requests(tokens: list[int]) -> list[Request]:
    """Two with a long beginning in common, which the engine reads first."""
    return [Request(i, [*tokens, i], str(i)) for i in (5, 6)]


def serve(worker: Worker, tokens: list[int]) -> None:
    pieces: list[Any] = []

    def told(piece: Any) -> None:
        pieces.append(piece)
        if piece is None and pieces.count(None) == 1:
            worker.stop()

    worker.submit(Work([tokens], 3, Sampling(), told))
    worker.run()
    assert [piece.generation_tokens for piece in pieces[:3]] == [1, 2, 3]


@pytest.mark.parametrize("name", PYTHON)
def test_in_python(mac: Mac, loaded: Any, capfd: pytest.CaptureFixture[str], name: str) -> None:
    PYTHON[name](loaded, prompt(loaded[1], 200))
    gc.collect()
    assert mac.once() and capfd.readouterr().out == ""


def test_an_answer_that_is_not_read_to_its_end(mac: Mac, loaded: Any) -> None:
    tokens = prompt(loaded[1], 20)
    makers: list[Callable[[], Any]] = [
        lambda: stream_generate(*loaded, tokens, max_tokens=9),
        lambda: generate_batch(*loaded, requests(tokens), max_tokens=1),
    ]
    for maker in makers:
        answers = maker()
        assert mac.changes == []  # nothing was begun
        next(answers)
        assert mac.limit == TINY
        del answers
        gc.collect()
        assert mac.once()


def test_the_generator_of_mlx_lm_ends_before_ours(mac: Mac, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets the same limit again, which changes nothing, and must not put that back after ours has ended."""
    closed: list[int] = []
    close = BatchGenerator.close
    monkeypatch.setattr(BatchGenerator, "close", lambda self: closed.append(mac.limit) or close(self))
    list(generate_batch(*loaded, requests(prompt(loaded[1], 20)), max_tokens=2))
    assert closed[0] == TINY and mac.once()


def test_within_each_other_only_the_outer_one_counts(mac: Mac) -> None:
    other = mx.new_stream(mx.default_device())
    with wired():
        for _ in range(2):
            with wired(other):
                assert mac.limit == TINY
            assert (mac.limit, mac.waits) == (TINY, [])
    assert mac.waits == [(), (other,)] and mac.once()  # each stream once, and before the limit changed


def test_of_two_at_once_the_last_to_end_restores_it(mac: Mac, loaded: Any) -> None:
    tokens = prompt(loaded[1], 20)
    one, other = (stream_generate(*loaded, tokens, max_tokens=9) for _ in range(2))
    next(one), next(other)
    one.close()  # type: ignore[attr-defined]
    assert mac.limit == TINY
    other.close()  # type: ignore[attr-defined]
    assert mac.once()


def test_in_several_threads(mac: Mac) -> None:
    ready = threading.Barrier(8)

    def work() -> None:
        with wired(generation_stream):
            ready.wait()
            assert mac.limit == TINY
            ready.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mac.once()


def test_a_gpu_that_fails_at_the_end_leaves_the_old_limit(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: Any) -> None:
        raise RuntimeError("Timeout")

    monkeypatch.setattr(mx, "synchronize", failed)
    with pytest.raises(RuntimeError, match="Timeout"), wired():
        pass
    assert mac.once()
    with pytest.raises(RuntimeError), wired():
        assert mac.limit == TINY  # counted anew
    assert mac.once()


@pytest.mark.skipif(version("mlx-lm") < "0.32", reason="mlx-lm 0.31 looks for Metal where it cannot be pretended")
def test_mlx_lm_warns_on_stdout(mac: Mac, loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is why its own wired_limit is not used."""
    with wired_limit(loaded[0], [generation_stream]):
        pass
    assert "[WARNING]" in capsys.readouterr().out and mac.once()


def test_without_metal_nothing_happens(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.metal.is_available():
        info = {key: value for key, value in mx.device_info().items() if key != "max_recommended_working_set_size"}
        monkeypatch.setattr(mx, "device_info", lambda *_: info)
    monkeypatch.setattr(mx, "set_wired_limit", None)
    list(stream_generate(*loaded, prompt(loaded[1], 20), max_tokens=2))


@pytest.mark.metal
def test_on_a_mac(loaded: Any) -> None:
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    before = mx.set_wired_limit(0)
    try:
        answer = stream_generate(*loaded, prompt(loaded[1], 20), max_tokens=4)
        next(answer)
        assert mx.set_wired_limit(recommended) == recommended
        list(answer)
        assert mx.set_wired_limit(0) == 0
    finally:
        mx.set_wired_limit(before)
