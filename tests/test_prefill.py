"""Reading a prompt: chunk sizes, the same text whatever they are, interrupts, and quantized keys and values."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import attend, load, stream_generate
from mlx_resonance.errors import DeviceError
from mlx_resonance.generation import PromptCache
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.kv_format import KVBits, KVFormat
from mlx_resonance.generation.prefill import STEP, Pace, prefill
from mlx_resonance.generation.prompt_cache import entries

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .checkpoints import COMMAND, prompt, source


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint, factor=16)


def greedy(loaded: Any, tokens: list[int], **options: Any) -> list[int]:
    """The tokens of a greedy answer."""
    options = {"max_tokens": 24} | options
    return [response.token for response in stream_generate(*loaded, tokens, **options)]


class Machine:
    """A GPU with a clock of its own: seconds of a layer per token, and per product of a query and a key."""

    def __init__(self, per_token: float, per_product: float, layers: int = 32) -> None:
        self.per_token, self.per_product, self.layers, self.now = per_token, per_product, layers, 0.0

    def attention(self, tokens: int, done: int) -> float:
        """Seconds of one layer's attention."""
        return self.per_product * tokens * (done + tokens)

    def read(self, length: int, step: int = STEP) -> list[tuple[int, int]]:
        """Read a prompt at its pace. Returns each chunk's tokens and those before it."""
        pace = Pace(self.layers, step, gpu=True, clock=lambda: self.now)
        chunks, done = [], 0
        while done < length:
            size = min(pace.size(done), length - done)
            with pace.reading(size, done):
                self.now += self.layers * (self.per_token * size + self.attention(size, done))
            chunks.append((size, done))
            done += size
        return chunks


@given(st.floats(1e-7, 1e-2), st.floats(1e-13, 1e-6), st.integers(1, 80), st.integers(1, 2**18), st.integers(1, 2**14))
def test_no_chunk_takes_a_layer_too_long(per_token: float, per_product: float, layers: int, length: int, step: int):
    machine = Machine(per_token, per_product, layers)
    chunks = []
    for chunk in machine.read(min(length, 100 * step), step):
        chunks.append(chunk)
    assert sum(size for size, _ in chunks) == min(length, 100 * step)
    assert chunks[0][0] <= 256 and all(1 <= size <= step for size, _ in chunks)
    for (before, _), (size, done) in itertools.pairwise(chunks):
        assert size <= 2 * max(before, min(256, step))
        assert machine.attention(size, done) <= 0.3 * 1.001 or size <= min(32, step)


def test_chunks_grow_on_a_fast_gpu_and_shrink_as_the_keys_grow_on_a_slow_one() -> None:
    fast = [size for size, _ in Machine(1e-6, 1e-12).read(20_000)]
    assert fast[:5] == [256, 512, 1024, 2048, 2048] and set(fast[4:-1]) == {2048}
    slow = [size for size, _ in Machine(1e-6, 5e-9).read(120_000)]
    longest = slow.index(max(slow))
    assert slow[longest:-1] == sorted(slow[longest:-1], reverse=True) and slow[-2] < max(slow) / 4


def test_a_pause_of_the_machine_costs_a_few_small_chunks() -> None:
    """Asleep for an hour within a chunk: the next ones are small, then as long as before."""
    machine = Machine(1e-6, 1e-12)
    pace = Pace(32, gpu=True, clock=lambda: machine.now)
    sizes, done = [], 0
    for number in range(20):
        size = pace.size(done)
        with pace.reading(size, done):
            machine.now += 3600 if number == 6 else 1e-3
        sizes.append(size)
        done += size
    assert sizes[6] == 2048 and sizes[7] == 32 and 2048 in sizes[8:16]


def test_several_gpus_read_the_chunks_of_the_slowest() -> None:
    """Each measures its own time, and is told the smallest size."""
    clocks = [0.0, 0.0]
    own = [Pace(32, gpu=True, clock=lambda number=number: clocks[number]) for number in (0, 1)]
    sizes: list[int] = []
    agreed = [Pace(32, gpu=True, clock=pace.clock, agree=lambda size: min(size, *sizes)) for pace in own]
    for done in range(0, 8000, 1000):
        sizes[:] = [pace.size(done) for pace in own]
        got = {pace.size(done) for pace in agreed}
        assert got == {min(sizes)}
        for number, seconds in enumerate((1e-3, 20.0)):
            with own[number].reading(min(sizes), done), agreed[number].reading(min(sizes), done):
                clocks[number] += seconds
    assert sizes[1] < 256 < sizes[0]


def test_chunks_are_of_fixed_size_on_a_cpu() -> None:
    pace = Pace(32, 512, gpu=False, clock=lambda: pytest.fail("nobody asked for the time"))
    assert {pace.size(done) for done in range(0, 2**20, 4096)} == {512}


@pytest.mark.parametrize(
    "said",
    [
        "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackError)",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)",
        "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size of 9",
    ],
)
def test_what_the_gpu_refuses_is_one_line_that_names_the_step(loaded: Any, said: str, monkeypatch: Any) -> None:
    tokens = prompt(loaded[1], 300)

    def fail(*_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(DeviceError, match=r"the GPU did not read 128 tokens in one pass.*try prefill_step_size=64"):
        greedy(loaded, tokens, prefill_step_size=128)
    monkeypatch.setattr(mx, "eval", lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        greedy(loaded, tokens, prefill_step_size=128)


LONG = (pytest.param(8, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long))


@pytest.mark.parametrize("kv_bits", [None, "8,4", KVFormat.of(4, True), *LONG])
def test_the_same_text_whatever_the_chunks(loaded: Any, kv_bits: KVBits, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(loaded[1], 300, start=500)
    expected = greedy(loaded, tokens, kv_bits=kv_bits)
    assert len(expected) == 24
    for step in (1, 7, 64, 2048):
        assert greedy(loaded, tokens, kv_bits=kv_bits, prefill_step_size=step) == expected, step
    monkeypatch.setattr(attend, "BUDGET", 9_000)
    assert greedy(loaded, tokens, kv_bits=kv_bits) == expected


def test_chunks_change_the_logits_by_rounding_only(loaded: Any) -> None:
    """So the likeliest token can only change between two that are as likely, up to that."""
    model, tokenizer = loaded
    tokens = mx.array(prompt(tokenizer, 500, start=700))
    whole = np.array(model(tokens[None])[0].astype(mx.float32))
    runners_up = np.sort(whole, axis=-1)[:, -2:]
    lead = runners_up[:, 1] - runners_up[:, 0]
    for step in (1, 7, 64, 256):
        cache = make_cache(model, len(tokens))
        parts = [model(tokens[at : at + step][None], cache=cache)[0] for at in range(0, len(tokens), step)]
        logits = np.array(mx.concatenate(parts).astype(mx.float32))
        differences = np.abs(logits - whole).max(axis=-1)
        assert differences.max() <= 1e-4 * np.abs(whole).max() and (differences.max() > 0 or step > 7), step
        same = logits.argmax(axis=-1) == whole.argmax(axis=-1)
        assert same[lead > 2 * differences].all() and same.mean() > 0.99, step


def test_an_interrupt_keeps_whole_chunks(loaded: Any, tmp_path: Path) -> None:
    tokens = prompt(loaded[1], 800)
    expected = greedy(loaded, tokens)

    def interrupt(done: int, _: int) -> None:
        if done >= 256:
            raise KeyboardInterrupt

    kept = PromptCache(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        greedy(loaded, tokens, prefill_step_size=128, disk_cache=kept, prompt_progress_callback=interrupt)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    seen: list[int] = []
    options = {"prefill_step_size": 128, "disk_cache": PromptCache(tmp_path, "key")}
    options["prompt_progress_callback"] = lambda done, _: seen.append(done)
    assert greedy(loaded, tokens, **options) == expected
    assert seen[:2] == [256, 384]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_interrupt_within_a_chunk_keeps_what_every_layer_has(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], layer: int
) -> None:
    """Between two layers, some have counted a chunk that the others have not seen."""
    tokens = prompt(loaded[1], 400)
    expected = greedy(loaded, tokens)
    block = type(loaded[0].layers[0])
    call, count = block.__call__, 0

    def fail(self: nn.Module, *arguments: Any, **options: Any) -> mx.array:
        nonlocal count
        count += 1
        result = call(self, *arguments, **options)
        if count == 2 * 5 + layer + 1:  # in the third chunk
            raise error
        return result

    with monkeypatch.context() as patch:
        patch.setattr(block, "__call__", fail)
        with pytest.raises(error):
            greedy(loaded, tokens, prefill_step_size=100, disk_cache=PromptCache(tmp_path, "key"))
    seen: list[int] = []
    progress = {"prompt_progress_callback": lambda done, _: seen.append(done)}
    assert greedy(loaded, tokens, disk_cache=PromptCache(tmp_path, "key"), **progress) == expected
    assert seen[0] == 200


WAITING = """
import signal, time
from mlx_resonance import cli
from mlx_resonance.generation import stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & has it ignored
prefill = stream.prefill
def waiting(*arguments, prompt_progress_callback, **options):
    def shown(done, total):
        prompt_progress_callback(done, total)
        if done >= 128:
            time.sleep(300)  # until Ctrl-C, however late it comes
    return prefill(*arguments, prompt_progress_callback=shown, **options)
stream.prefill = waiting
cli.main()
"""


def test_ctrl_c_in_a_prompt_and_the_next_run_resumes(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    (tmp_path / "prompt.txt").write_text(source()[:6000])
    command = [*COMMAND, "--model", checkpoint, "--prompt-file", tmp_path / "prompt.txt", "--factor", "64", "--json"]
    command += ["--max-tokens", "8", "--prefill-step-size", "64"]
    expected = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert expected["prompt_tokens"] > 1024
    command += ["--prompt-cache", folder]
    terminal, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *command[1:]],
        stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)

    def read() -> bytes:
        """What the terminal shows next; empty at its end, which is an OSError on Linux."""
        assert select.select([terminal], [], [], 120)[0], shown
        with contextlib.suppress(OSError):
            return os.read(terminal, 4096)
        return b""

    shown = b""
    while b"128/%d" % expected["prompt_tokens"] not in shown:
        piece = read()
        assert piece, shown
        shown += piece
    process.send_signal(signal.SIGINT)
    while piece := read():
        shown += piece
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert (process.returncode, out) == (130, b""), shown
    assert shown.rpartition(b"error:")[2].strip() == b"interrupted"
    (entry,) = entries(folder)
    assert entry.tokens == 128
    again = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert again["text"] == expected["text"] and again["prompt_tokens"] == expected["prompt_tokens"]
    (longer,) = entries(folder)
    assert longer.tokens > expected["prompt_tokens"] and len(list(folder.glob("*.safetensors"))) == 2


def test_quantized_caches_are_small_from_the_first_chunk_on(stdlib_llama: Path) -> None:
    model, tokenizer = load(stdlib_llama)  # in float16
    tokens = prompt(tokenizer, 301)
    sizes = {}
    for kv_bits in (None, 8, "8,4", 4):
        cache = make_cache(model, 300, kv_bits)
        first = list[int]()
        for at in range(2):
            prefill(model, tokens[: 100 * at + 101], cache)
            first.append(sum(layer.nbytes for layer in cache))
        assert first[0] == first[1]  # allocated once, for all of it
        sizes[kv_bits] = first[0]
    assert sizes[None] == 2 * 5 * 2 * 64 * 2 * 300
    assert sizes[8] <= 0.56 * sizes[None] and sizes[4] <= 0.32 * sizes[None]
    assert sizes["8,4"] == (sizes[8] + sizes[4]) / 2


@pytest.mark.parametrize("length", [2048, pytest.param(4096, marks=pytest.mark.long)])
def test_quantized_caches_lower_the_peak(checkpoint: Path, length: int) -> None:
    """The peak above the weights. The step is small: its work is the same whatever the format."""
    model, tokenizer = load(checkpoint, factor=16)
    tokens, peaks = prompt(tokenizer, length), {}
    for kv_bits in (None, 8, "8,4", 4):
        gc.collect()
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in stream_generate(model, tokenizer, tokens, max_tokens=2, kv_bits=kv_bits, prefill_step_size=128):
            pass
        peaks[kv_bits] = mx.get_peak_memory() - start
    assert peaks[4] < peaks["8,4"] < peaks[8] < peaks[None], peaks


def test_8_bits_cost_less_than_a_percent_of_the_loss(loaded: Any) -> None:
    model, tokenizer = loaded
    losses = {}
    tokens = prompt(tokenizer, 1025, start=3000)
    for kv_bits in (None, 8, "8,4", 4, KVFormat.of(4, True)):
        cache = make_cache(model, 1024, kv_bits)
        logits = mx.concatenate(
            [model(mx.array(tokens[at : at + 256])[None], cache=cache)[0] for at in range(0, 1024, 256)]
        )
        losses[kv_bits] = nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="mean").item()
    assert losses[None] < 5
    assert losses[8] != losses[None] and losses[8] == pytest.approx(losses[None], rel=0.01)
    assert losses[4] != losses[8] and losses[4] == pytest.approx(losses[None], rel=0.1)
    assert losses["8,4"] == pytest.approx(losses[None], rel=0.01)
    assert losses[KVFormat.of(4, True)] == pytest.approx(losses[None], rel=0.05)
