"""What is promised for a text holds on every way to one: generate, chat, server, a batch, Python, several machines.

Ways × promises: each cell is a test on the tiny checkpoint, and on SmolLM2 those that need a model with an answer.
Several machines cannot chat or serve (a chat reads the terminal of one process): that they say so is tested, too.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, generation, stream_generate
from mlx_resonance.cli.engine import plan_engine
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import PromptCache, cache_key, prompt_tokens, require_memory
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.prefill import Pace
from mlx_resonance.generation.quantized_cache import BatchQuantizedCache, QuantizedCache
from mlx_resonance.generation.speculation import Proposals

import pytest

from .checkpoints import source
from .pretend import pretend_gpu
from .serving import CHAT, serving
from .test_conversation import TEMPLATE
from .test_distributed import COMMANDS, MAIN, start

NEW = 16  # tokens of an answer
TEXT = " ".join(source()[4000:5200].split())  # a line of a pipe is a question to the chat
HALF, TOO_LONG = TEXT[: len(TEXT) // 2], " ".join(source()[:9000].split())
LONGER = " ".join(source()[4000:7000].split())  # than the trained context
REPEATED = ("0, " * 40).strip()  # its answer goes on like that
ASKED: list[tuple[str, dict[str, Any]]] = [  # of several machines, in this order
    (TEXT, {}), (TEXT, {"kv_bits": 8}), (TEXT, {"kv_bits": 4}), (TOO_LONG, {}), (TEXT, {"memory": "1GB"}),
    (TEXT, {"kv_bits": "8,4"}), (TEXT, {"kv_bits": 4, "kv_rotate": True}),
    (TEXT, {"prefill_step_size": 64}), (HALF, {"prompt_cache": None}), (TEXT, {"prompt_cache": None}),
    (LONGER, {"factor": 1, "extend": "dynamic"}), (LONGER, {"factor": 1, "extend": "dynamic", "kv_bits": 8}),
    (REPEATED, {"prompt_lookup": 4}), (REPEATED, {"prompt_lookup": "off"}), (REPEATED, {}),
    (REPEATED, {"draft_model": None}),
]  # fmt: skip


@dataclass
class Said:
    """What a way says: a text, or why there is none; and how many of the prompt's tokens were cached, if it tells."""

    text: str = ""
    error: str = ""
    cached: int | None = None


def flags_of(options: dict[str, Any]) -> list[str]:
    """Options under the library's names, as flags of a command."""
    flags = {f"--{key.replace('_', '-')}": value for key, value in options.items()}
    return [part for flag, value in flags.items() for part in ([flag] if value is True else [flag, str(value)])]


@dataclass
class Way(ABC):
    """A way to a text. `ask` is given a prompt and options under the library's names, which become flags."""

    folder: Path
    factor: int
    run: Any
    work: Path
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = type(self).__name__

    def flags(self, **options: Any) -> list[str]:
        """The options as flags of a command."""
        options = {"factor": self.factor} | options
        return flags_of(options)

    @abstractmethod
    def ask(self, text: str, **options: Any) -> Said:
        """What it says to a prompt."""


class Generate(Way):
    def ask(self, text: str, **options: Any) -> Said:
        arguments = ("generate", "-m", self.folder, "-p", text, "--max-tokens", NEW, "--json", *self.flags(**options))
        code, out, err = self.run(*arguments)
        if code:
            return Said(error=err.splitlines()[-1])
        result = json.loads(out)
        return Said(result["text"], cached=result.get("cached_tokens"))


class Chat(Way):
    def ask(self, text: str, **options: Any) -> Said:
        kept = [] if "prompt_cache" in options else ["--no-prompt-cache"]
        flags = [*self.flags(**options), *kept, "--max-tokens", NEW]
        code, out, err = self.run("chat", "-m", self.folder, *flags, stdin=text + "\n")
        if code:
            return Said(error=err.splitlines()[-1])
        cached = [line for line in err.splitlines() if "prompt tokens from the cache" in line]
        return Said(out[:-1], cached=int(cached[-1].split()[0].replace(",", "")) if cached else 0)


class Server(Way):
    def ask(self, text: str, **options: Any) -> Said:
        if "memory" in options:
            _, _, err = self.run("server", "-m", self.folder, "--port", 0, *self.flags(**options))
            return Said(error=err.splitlines()[-1])
        defaults: dict[str, Any] = {"context": None, "kv_bits": None, "prefill_step_size": 2048, "memory": None}
        defaults |= {"force": False, "prompt_cache": None, "prompt_cache_size": None}
        opened = defaults | options | {"no_prompt_cache": "prompt_cache" not in options}
        opened["kv_bits"] = KVFormat.of(opened["kv_bits"], opened.pop("kv_rotate", False))
        factor, extend = opened.pop("factor", self.factor), opened.pop("extend", None)
        checkpoint = Checkpoint.open(self.folder, factor=factor, extend=extend)
        with serving(lambda: plan_engine(checkpoint, **opened).load()) as served:
            asked = {"messages": [{"role": "user", "content": text}], "max_tokens": NEW, "temperature": 0}
            status, answer = served.ask(CHAT, asked)
        if status != 200:
            return Said(error=answer["error"]["message"])
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Said(answer["choices"][0]["message"]["content"], cached=cached)


class Batch(Way):
    def ask(self, text: str, **options: Any) -> Said:
        prompts, output = self.work / "prompts.jsonl", self.work / "answers.jsonl"
        output.unlink(missing_ok=True)
        others = ["import os\n", "def main(argv):\n    return"]  # it is not alone
        lines = [{"id": number, "prompt": prompt} for number, prompt in enumerate([text, *others])]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        flags = ["--prompts-file", prompts, "--output", output, "--max-tokens", NEW, *self.flags(**options)]
        code, _, err = self.run("generate", "-m", self.folder, *flags)
        if code:
            return Said(error=err.splitlines()[-1])
        answers = [json.loads(line) for line in output.read_text().splitlines()[1:]]
        return Said(next(answer["text"] for answer in answers if answer["id"] == 0))


class Python(Way):
    def ask(self, text: str, **options: Any) -> Said:
        memory, kept = options.pop("memory", None), options.pop("prompt_cache", None)
        try:
            factor, extend = options.pop("factor", self.factor), options.pop("extend", None)
            checkpoint = Checkpoint.open(self.folder, factor=factor, extend=extend)
            tokens = prompt_tokens(checkpoint.tokenizer, text, chat=True)
            if memory is not None:  # a library's caller plans before it loads
                require_memory(checkpoint, len(tokens) + NEW, memory=10**9)
            if kept is not None:
                options["disk_cache"] = PromptCache(kept, cache_key(checkpoint, options.get("kv_bits")))
            model = checkpoint.load()
            if "draft_model" in options:
                options["draft_model"] = Checkpoint.open(options["draft_model"]).load()
            responses = list(stream_generate(model, checkpoint.tokenizer, tokens, max_tokens=NEW, **options))
        except UsageError as error:
            return Said(error=str(error))
        return Said("".join(response.text for response in responses), cached=responses[-1].cached_tokens)


class Machines(Way):
    """Two processes, as mlx.launch starts them on two Macs. Starting them takes long: they carry out all asks at once.

    The folders of a prompt cache and of a draft model are theirs, and what is asked is in `ASKED`.
    """

    def ask(self, text: str, **options: Any) -> Said:
        theirs = dict.fromkeys(options.keys() & {"prompt_cache", "draft_model"})
        number = ASKED.index((text, options | theirs))
        (code, out, err, _), other = (process[number] for process in machines(self.folder, self.factor))
        assert other[0] == code and not other[1]
        if code:
            return Said(error=next(line for line in err.splitlines() if line.startswith("error: ")))
        result = json.loads(out)
        return Said(result["text"], cached=result.get("cached_tokens"))


@cache
def machines(folder: Path, factor: int) -> list[list[Any]]:
    """How each of two processes carried out what is asked: exit code, stdout, stderr."""
    with tempfile.TemporaryDirectory() as name:
        work, commands = Path(name), []
        for text, options in ASKED:
            theirs = {"prompt_cache": work / "kept", "draft_model": folder}
            given = {"factor": factor} | {key: value or theirs[key] for key, value in options.items()}
            commands.append([["-m", str(folder), "-p", text, "--max-tokens", str(NEW), "--json", *flags_of(given)]] * 2)
        (work / "commands.json").write_text(json.dumps(commands))
        both = start([[sys.executable, "-c", COMMANDS, work / "commands.json"]] * 2, work)
    assert [code for code, *_ in both] == [0, 0], both
    return [json.loads(out) for _, out, _ in both]


WAYS = [Generate, Chat, Server, Batch, Python, Machines]


@pytest.fixture(scope="module")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("promises") / "model"
    shutil.copytree(checkpoint, target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__.lower())
def way(request: Any, tiny: Path, run: Any, tmp_path: Path) -> Way:
    return request.param(tiny, 4, run, tmp_path)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every chunk that this process reads."""
    seen: list[int] = []
    reading = Pace.reading

    def counted(self: Pace, tokens: int, done: int) -> Any:
        seen.append(tokens)
        return reading(self, tokens, done)

    monkeypatch.setattr(Pace, "reading", counted)
    return seen


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> set[int | str]:
    """The formats of the quantized KV caches that this process writes to."""
    formats: set[int | str] = set()
    for kind in (QuantizedCache, BatchQuantizedCache):

        def seen(self: Any, keys: Any, values: Any, update: Any = kind.update_and_fetch) -> Any:
            formats.add(self.format.value)
            return update(self, keys, values)

        monkeypatch.setattr(kind, "update_and_fetch", seen)
    return formats


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[Any, str]:
    """The greedy answer by KV bits."""
    texts = of_mlx_lm(tiny, TEXT, (None, 8, 4, "8,4", "4 rotated"))
    assert texts[None] and texts[4] != texts[None]
    return texts


@cache
def of_mlx_lm(
    folder: Path, text: str, kv_bits: tuple[Any, ...], factor: int = 4, extend: str | None = None
) -> dict[Any, str]:
    """The greedy answer by KV bits, without any engine: mlx-lm's own functions."""
    from mlx_resonance.generation.cache import make_cache

    import mlx_lm

    checkpoint = Checkpoint.open(folder, factor=factor, extend=extend)
    model, tokens = checkpoint.load(), prompt_tokens(checkpoint.tokenizer, text, chat=True)
    texts = {}
    for bits in kv_bits:
        format = KVFormat.of(4, True) if bits == "4 rotated" else bits
        options = {"prompt_cache": make_cache(model, len(tokens) + NEW, format), "max_tokens": NEW}
        texts[bits] = mlx_lm.generate(model, checkpoint.tokenizer, tokens, **options)
    return texts


def test_the_same_greedy_text(way: Way, expected: dict[int | None, str]) -> None:
    assert way.ask(TEXT).text == expected[None]


@pytest.mark.parametrize("bits", [8, 4, "8,4", "4 rotated"])
def test_kv_formats(way: Way, expected: dict[Any, str], quantized: set[int | str], bits: int | str) -> None:
    options = {"kv_bits": 4, "kv_rotate": True} if bits == "4 rotated" else {"kv_bits": bits}
    assert way.ask(TEXT, **options).text == expected[bits]
    assert quantized == {bits} or way.name == "Machines"  # other processes


@pytest.mark.parametrize("bits", [None, 8])
def test_past_the_context(way: Way, tiny: Path, bits: int | None) -> None:
    """By a position map: the text of mlx-lm's own loop; a batch, whose rows have positions of their own, says so."""
    said = way.ask(LONGER, factor=1, extend="dynamic", **({} if bits is None else {"kv_bits": bits}))
    if way.name == "Batch":
        assert "dynamic:128 is for one text at a time" in said.error
        return
    assert said.text == of_mlx_lm(tiny, LONGER, (None, 8), 1, "dynamic")[bits]


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of proposed tokens of every pass that this process makes with a proposer."""
    counts: list[int] = []
    passed = Proposals.passed

    def counted(self: Any, count: int, *args: Any) -> None:
        counts.append(count)
        passed(self, count, *args)

    monkeypatch.setattr(Proposals, "passed", counted)
    return counts


@pytest.mark.parametrize("setting", [4, "off", None])
def test_prompt_lookup(way: Way, tiny: Path, proposed: list[int], setting: int | str | None) -> None:
    """The same text, unless asked otherwise with lookup; a batch has no room for another row's guesses, and says so."""
    said = way.ask(REPEATED, **({} if setting is None else {"prompt_lookup": setting}))
    if way.name == "Batch" and setting is not None:
        assert "one text at a time" in said.error
        return
    assert said.text == of_mlx_lm(tiny, REPEATED, (None,))[None]
    if way.name != "Machines":  # other processes; by default they do not look up: their times differ
        assert max(proposed, default=0) > 0 or setting == "off" or way.name == "Batch"
        assert not proposed or setting != "off"


def test_a_draft_model(way: Way, tiny: Path, proposed: list[int]) -> None:
    """The same text; batches and several machines, which have no place for one, say so."""
    said = way.ask(REPEATED, draft_model=tiny)
    if way.name in ("Batch", "Machines"):
        assert ("one text at a time" if way.name == "Batch" else "one process") in said.error
        return
    assert said.text == of_mlx_lm(tiny, REPEATED, (None,))[None]
    assert max(proposed) > 0


def test_the_context_is_checked(way: Way) -> None:
    said = way.ask(TOO_LONG)
    assert not said.text and "2,048" in said.error and "context" in said.error


def test_the_memory_is_planned(way: Way) -> None:
    """1 GB is less than what is left to everything else."""
    said = way.ask(TEXT, memory="1GB")
    assert not said.text and "the limit is 0.0 MB" in said.error


def test_the_chunk_rule(way: Way, expected: dict[int | None, str], launches: list[int]) -> None:
    said = way.ask(TEXT, prefill_step_size=64)
    assert said.text == expected[None]
    rows = 3 if way.name == "Batch" else 1  # the pace is that of all rows together
    assert way.name == "Machines" or (max(launches) == 64 * rows and len(launches) >= 5)


def test_the_chunk_rule_of_a_gpu(
    way: Way, expected: dict[int | None, str], launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which every chunk takes a layer a second, chunks become as small as they may."""
    if way.name == "Machines":
        pytest.skip("the clock of other processes is theirs: tests/test_prefill.py has their agreement")
    made, now = Pace.__init__, itertools.count()

    def slow(self: Pace, *args: Any, **options: Any) -> None:
        made(self, *args, **options | {"gpu": True, "clock": lambda: 5.0 * next(now)})

    monkeypatch.setattr(Pace, "__init__", slow)
    assert way.ask(TEXT).text == expected[None]
    assert launches[0] <= 256 and min(launches[1:-1]) <= 64 < launches[0]


def test_a_gpu_launches_the_bare_kernel(
    way: Way, expected: dict[int | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that writes a text pays for derivatives: prompt and answer, every layer."""
    if way.name == "Machines":
        pytest.skip("the GPU of other processes cannot be pretended")
    launches = pretend_gpu(monkeypatch)
    assert way.ask(TEXT).text == expected[None]
    assert launches["transformable"] == 0 and launches["all"] >= 5 * NEW  # 5 layers


def test_the_disk_cache(
    way: Way, tiny: Path, run: Any, tmp_path: Path, expected: dict[int | None, str], launches: list[int], caplog: Any
) -> None:
    """What one way has read another need not read; several machines keep a part each, which only they can use."""
    folder = tmp_path / "kept"
    first = way if way.name == "Machines" else Generate(tiny, 4, run, tmp_path)
    for text in (HALF, TEXT):  # the second one continues the first one's file
        said = first.ask(text, prompt_cache=folder)
    assert said.text == expected[None]
    if way.name == "Machines":  # the second ask has found the first one's file, in each of them
        assert said.cached is not None and said.cached > 100
        return
    written = list(folder.glob("*.safetensors"))
    assert len(written) >= 2
    launches.clear()
    said = way.ask(TEXT, prompt_cache=folder)
    assert said.text == expected[None]
    assert all(path.exists() for path in written) and "damaged" not in caplog.text
    if said.cached is None:  # a batch does not tell; its other prompts are short
        assert sum(launches) < 100
    else:
        assert said.cached > 280


@pytest.mark.parametrize("command", ["chat", "server"])
def test_several_machines_neither_chat_nor_serve(tiny: Path, tmp_path: Path, command: str) -> None:
    ends = start([[*MAIN, command, "-m", tiny]] * 2, tmp_path)
    assert {code for code, *_ in ends} == {2}
    lines = {line for *_, err in ends for line in err.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1 and "process" in lines.pop()


def test_every_public_way_is_here() -> None:
    """A new way to a text has to be added above."""
    from mlx_resonance.cli import app

    commands = {command.name for command in app.registered_commands}
    writes = {"generate", "chat", "server"}
    others = {"convert", "verify", "inspect", "plan", "finetune", "demo", "lm"}  # lm: mlx-lm's own, with our angles
    assert commands == writes | others
    assert {name for name in generation.__all__ if "generate" in name} == {"generate", "stream_generate"}
