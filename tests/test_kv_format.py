"""KV formats: what a user may write, bytes, rotation; caches hold what was put in, whatever happens to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load, plan_memory
from mlx_resonance.attend import attend, attend_quantized
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import Engine, PromptCache, cache_key
from mlx_resonance.generation.batch import Request, generate_batch
from mlx_resonance.generation.cache import make_cache
from mlx_resonance.generation.kv_format import ROTATED, KVFormat, group_size, rotation
from mlx_resonance.generation.quantized_cache import QuantizedCache

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import prompt

ALL = [KVFormat.of(*args) for args in ((8,), (4,), ("8,4",), ("4,8",), (8, True), (4, True), ((8, 4), True))]
FORMATS = pytest.mark.parametrize("format", ALL, ids=lambda format: str(format.value).replace(" ", "-"))
DIMS, SIZE = 64, 64


@pytest.fixture(scope="module")
def loaded(stdlib_llama: Path) -> Any:
    return load(stdlib_llama, factor=4)


def numbers(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Random numbers, some features of which are far larger than the others, as keys have them."""
    scale = mx.where(mx.arange(shape[-1]) % 13 == 0, 9.0, 1.0)
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)


def cached(format: KVFormat, keys: mx.array, values: mx.array, *sizes: int, step: int = 256) -> Any:
    """A cache of them, appended in pieces."""
    cache, at = QuantizedCache(SIZE, format), 0
    cache.step = step
    for size in sizes or (keys.shape[2],):
        cache.update_and_fetch(keys[:, :, at : at + size], values[:, :, at : at + size])
        at += size
    assert at == keys.shape[2] == cache.offset == cache.size()
    return cache


def held(cache: Any) -> list[mx.array]:
    """What a cache holds: six arrays."""
    return [x[:, :, : cache.offset] for part in (cache.keys, cache.values) for x in part]


def same(one: Any, other: Any) -> bool:
    return all(mx.array_equal(x, y) for x, y in zip(held(one), held(other), strict=True))


def restored(cache: Any) -> tuple[mx.array, mx.array]:
    """Keys and values in float64's neighbourhood: dequantized in float32, rotated back by NumPy."""
    found = []
    for part, bits in ((cache.keys, cache.format.key_bits), (cache.values, cache.format.value_bits)):
        packed, *scales = (x[:, :, : cache.offset] for x in part)
        x = mx.dequantize(packed, *(s.astype(mx.float32) for s in scales), group_size=cache.group_size, bits=bits)
        if cache.format.rotate:
            forward, _ = rotation(x.shape[-1], mx.float32)
            x = mx.array(np.array(x) @ np.linalg.inv(np.array(forward).astype(np.float64)))
        found.append(x)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("kv_bits", "format"),
    [
        (None, KVFormat()), (8, KVFormat(8, 8)), ("4", KVFormat(4, 4)), ((8, 4), KVFormat(8, 4)),
        ("8,4", KVFormat(8, 4)), ("4, 8", KVFormat(4, 8)), ((8,), KVFormat(8, 8)), (KVFormat(4, 4), KVFormat(4, 4)),
    ],
)  # fmt: skip
def test_what_a_user_may_write(kv_bits: Any, format: KVFormat) -> None:
    assert KVFormat.of(kv_bits) == format
    if format.quantized:
        rotated = KVFormat.of(kv_bits, True)
        assert rotated == KVFormat(format.key_bits, format.value_bits, True) == KVFormat.of(rotated)
        assert KVFormat.of(format.value) == format


@pytest.mark.parametrize(
    "kv_bits", [3, 16, 0, True, 8.0, "", "8,", "8,4,4", (8, 4, 4), (), (8, None), (8, 3), "8,3", b"8"]
)
def test_what_a_user_may_not_write(kv_bits: Any) -> None:
    with pytest.raises(UsageError, match=r"^kv_bits must be 4 or 8") as error:
        KVFormat.of(kv_bits)
    assert error.value.option == "kv_bits"


def test_nothing_to_rotate_for(loaded: Any) -> None:
    for refused in (lambda: KVFormat.of(None, True), lambda: Engine(*loaded, kv_rotate=True)):
        with pytest.raises(UsageError, match="rotation is for a quantized KV cache: try kv_bits=4") as error:
            refused()
        assert error.value.option == "kv_rotate"


def test_names() -> None:
    assert [format.value for format in ALL] == [8, 4, "8,4", "4,8", "8 rotated", "4 rotated", "8,4 rotated"]
    assert [KVFormat().name(size) for size in (2, 4)] == ["16 bit", "32 bit"]
    assert [format.name(2) for format in ALL[1:3] + ALL[5:]] == [
        "4 bit",
        "8,4 bit",
        "4 bit, rotated",
        "8,4 bit, rotated",
    ]
    assert KVFormat().value is None and json.dumps(KVFormat().value) == "null"


@pytest.mark.parametrize("item_size", [2, 4])
def test_bytes(item_size: int) -> None:
    """In % of 16 bits, by hand: 8 bits and two times 16 for 64 numbers are 8.5 bits."""
    percent = {format.value: 100 * format.bytes_per_pair(64, item_size) / 4 for format in ALL}
    assert percent[8] == percent["8 rotated"] == 100 * 8.5 / 16 and percent[4] == 100 * 4.5 / 16
    assert percent["8,4"] == percent["4,8"] == percent["8,4 rotated"] == 40.625
    assert KVFormat.of("8,4").bytes_per_pair(96, item_size) == (8 + 1 + 4 + 1) / 8  # groups of 32
    assert KVFormat().bytes_per_pair(64, item_size) == 2 * item_size


@FORMATS
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_cache_takes_these_bytes(format: KVFormat, dtype: mx.Dtype) -> None:
    keys, values = (numbers(1, 3, 40, DIMS, seed=seed, dtype=dtype) for seed in (1, 2))
    arrays = held(cached(format, keys, values))
    assert sum(x.nbytes for x in arrays) == 3 * 40 * DIMS * format.bytes_per_pair(DIMS, dtype.size)
    assert {x.dtype for x in arrays} == {mx.uint32, mx.float16 if dtype == mx.float32 else dtype}


@pytest.mark.parametrize("dims", ROTATED)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_rotation_is_orthogonal(dims: int, dtype: mx.Dtype) -> None:
    forward, back = (np.array(x.astype(mx.float32)).astype(np.float64) for x in rotation(dims, dtype))
    assert np.array_equal(forward @ back, np.eye(dims))  # exactly
    factor = 2.0 if dims in (32, 128) else 1.0
    assert np.array_equal(forward @ forward.T, factor * np.eye(dims)) and np.array_equal(back, forward.T / factor)
    assert len(np.unique(np.abs(forward))) == 1  # every feature is spread over all
    hadamard = np.array([[1]])
    while len(hadamard) < dims:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.sign(forward) * hadamard
    assert np.array_equal(signs, np.repeat(signs[:, :1], dims, axis=1)) and 0.2 < np.mean(signs > 0) < 0.8


def test_the_rotation_is_that_of_the_files_on_disk() -> None:
    """Another would read them as nonsense: signs of a head of 64, as another process makes them."""
    code = (
        "from mlx_resonance.generation.kv_format import rotation; import mlx.core as mx;"
        "print(''.join('-+'[x > 0] for x in rotation(64, mx.float32)[0][:, 0].tolist()))"
    )
    signs = "++-++++-++-++--+++------++-++--+++-+-++--++--++---+-++---+-+--++"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == signs


@pytest.mark.parametrize("dims", [96, 160, 192])
def test_other_head_sizes_are_not_rotated(dims: int) -> None:
    KVFormat.of(4).check(dims)
    with pytest.raises(UsageError, match=f"head size that is one of 32, 64, 128, 256, got {dims}$") as error:
        KVFormat.of(4, True).check(dims)
    assert error.value.option == "kv_rotate"


def test_every_way_refuses_a_head_size(random_llama: Path, run: Any) -> None:
    """Of 16 features."""
    with pytest.raises(UsageError, match="multiple of 32, got 16"):
        plan_memory(random_llama, 8, kv_bits=(8, 4), kv_rotate=True)
    code, _, err = run("plan", "-m", random_llama, "--kv-bits", "8,4", "--kv-rotate")
    assert code == 2 and err.count("\n") == 1 and "got 16 (--kv-bits)" in err


@pytest.mark.parametrize("dims", ROTATED)
@pytest.mark.parametrize("length", [1, 5])
def test_rotating_changes_nothing_before_quantizing(dims: int, length: int) -> None:
    format, scale = KVFormat.of(4, True), dims**-0.5
    queries, keys, values = (numbers(2, heads, n, dims, seed=heads + n) for heads, n in ((4, length), (2, 30), (2, 31)))
    values = values[:, :, :30]
    mask = None if length == 1 else "causal"
    plain = attend(queries, keys, values, scale=scale, mask=mask)
    turned = attend(format.asked(queries), format.stored(keys), format.stored(values), scale=scale, mask=mask)
    scores = mx.repeat(keys, 2, axis=1) @ queries.swapaxes(-1, -2)
    rotated = mx.repeat(format.stored(keys), 2, axis=1) @ format.asked(queries).swapaxes(-1, -2)
    assert mx.abs(scores - rotated).max() < 1e-6 * mx.abs(scores).max() * dims**0.5
    assert mx.abs(plain - format.restored(turned)).max() < 1e-5 * mx.abs(values).max()
    assert mx.abs(format.stored(keys) - keys).max() > 1  # it rotates


@pytest.mark.parametrize("bits", [4, 8])
def test_rotating_spreads_large_features(bits: int) -> None:
    """The error of quantizing is smaller: what it is for."""
    keys, values = numbers(1, 2, 200, DIMS), numbers(1, 2, 200, DIMS, seed=1)
    errors = [
        mx.abs(found - wanted).square().mean().item()
        for format in (KVFormat.of(bits), KVFormat.of(bits, True))
        for found, wanted in zip(restored(cached(format, keys, values)), (keys, values), strict=True)
    ]
    assert errors[2] < 0.5 * errors[0] and errors[3] < 0.5 * errors[1]


@FORMATS
def test_each_has_the_error_of_its_bits(format: KVFormat) -> None:
    """Half a step at most, a 15th or a 255th of the range of 64 numbers; MLX moves steps so that one of them is 0."""
    keys, values = numbers(1, 2, 50, DIMS), numbers(1, 2, 50, DIMS, seed=1)
    for found, wanted, bits in zip(
        restored(cached(format, keys, values)), (keys, values), (format.key_bits, format.value_bits), strict=True
    ):
        x, y = (format.stored(z) for z in (found.astype(mx.float32), wanted))
        step = (y.max(axis=-1, keepdims=True) - y.min(axis=-1, keepdims=True)) / (2**bits - 1)
        error = (mx.abs(x - y) / step).max().item()
        assert 0.45 < error < 1.1, error


@FORMATS
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 4, 17])
def test_attention_is_that_of_the_dequantized_keys(format: KVFormat, dtype: mx.Dtype, length: int) -> None:
    """With grouped queries, and a mask of a batch whose second row begins with padding."""
    keys, values = (numbers(2, 3, 70, DIMS, seed=seed, dtype=dtype) for seed in (1, 2))
    queries, scale = numbers(2, 9, length, DIMS, seed=3, dtype=dtype) / 32, DIMS**-0.5
    cache = cached(format, keys, values)
    arrays = cache.keys_and_values()
    masks = {"none": None if length == 1 else "causal"}
    visible = mx.arange(70) >= mx.array([0, 20])[:, None]
    masks["padded"] = mx.broadcast_to(visible[:, None, None], (2, 1, length, 70))  # type: ignore[assignment]
    for mask in masks.values():
        found = attend_quantized(queries, *arrays, cache=cache, scale=scale, mask=mask)
        plain = (x.astype(mx.float32) for x in restored(cache))
        wanted = attend(queries.astype(mx.float32), *plain, scale=scale, mask=mask)
        assert found.dtype == dtype and found.shape == wanted.shape
        tolerance = 2e-5 if dtype == mx.float32 else 0.03
        assert mx.abs(found.astype(mx.float32) - wanted).max() < tolerance * mx.abs(wanted).max()


def test_the_padding_of_a_batch_is_not_seen() -> None:
    format = KVFormat.of("8,4", True)
    keys, values = numbers(1, 3, 30, DIMS), numbers(1, 3, 30, DIMS, seed=1)
    rows = [cached(format, keys, values), cached(format, keys[:, :, :11], values[:, :, :11])]
    batch = QuantizedCache.merge(rows)
    mask, query = batch.make_mask(1), numbers(1, 6, 1, DIMS, seed=2)
    new = [numbers(1, 3, 1, DIMS, seed=seed) for seed in (7, 8)]
    arrays = batch.update_and_fetch(*(mx.repeat(x, 2, axis=0) for x in new))
    both = attend_quantized(mx.repeat(query, 2, axis=0), *arrays, cache=batch, scale=0.1, mask=mask)
    for row, out in zip(rows, both, strict=True):
        row.update_and_fetch(*new)
        alone = attend_quantized(query, *row.keys_and_values(), cache=row, scale=0.1, mask=None)
        assert mx.abs(alone[0] - out).max() < 1e-5


@FORMATS
def test_whatever_the_pieces(format: KVFormat) -> None:
    """Grown past what was allocated, trimmed and written again: the same bits."""
    keys, values = numbers(1, 2, 90, DIMS), numbers(1, 2, 90, DIMS, seed=1)
    whole = cached(format, keys, values)
    assert same(whole, cached(format, keys, values, 1, 40, 1, 48, step=32))
    again = cached(format, keys, mx.concatenate([values[:, :, :60], -values[:, :, 60:]], axis=2), 70, 20)
    assert not same(whole, again)
    assert again.is_trimmable() and again.trim(30) == 30
    again.update_and_fetch(keys[:, :, 60:], values[:, :, 60:])
    assert same(whole, again) and again.trim(1000) == 90


@FORMATS
def test_rows_of_a_batch_come_back(format: KVFormat) -> None:
    lengths = (7, 30, 1)
    rows = [cached(format, numbers(1, 2, n, DIMS, seed=n), numbers(1, 2, n, DIMS, seed=n + 50)) for n in lengths]
    batch = QuantizedCache.merge(rows)
    keys, values = numbers(3, 2, 2, DIMS, seed=8), numbers(3, 2, 2, DIMS, seed=9)
    batch.update_and_fetch(keys, values)
    for i, row in enumerate(rows):
        row.update_and_fetch(keys[i : i + 1], values[i : i + 1])
        back = batch.extract(i)
        assert back.format == format and back.offset == lengths[i] + 2 and same(back, row)


@FORMATS
def test_bits_come_back_from_disk(loaded: Any, tmp_path: Path, format: KVFormat) -> None:
    model, tokenizer = loaded
    tokens = prompt(tokenizer, 60)
    cache = make_cache(model, 70, format)
    model(mx.array([tokens]), cache=cache)
    key = "key-rotated" if format.rotate else "key"
    PromptCache(tmp_path, key).store(tokens, cache)
    again = make_cache(model, 70, format)
    assert PromptCache(tmp_path, key).fetch([*tokens, 5], again) == 60
    for one, other in zip(cache, again, strict=True):
        assert other.format == format and same(one, other)
    logits = [model(mx.array([[5]]), cache=caches) for caches in (cache, again)]
    assert mx.array_equal(*logits)


def test_formats_never_mix_on_disk(stdlib_llama: Path, loaded: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(stdlib_llama, factor=4)
    keys = {format: cache_key(checkpoint, format) for format in (KVFormat(), *ALL)}
    assert len(set(keys.values())) == len(keys)
    assert keys[ALL[2]] == cache_key(checkpoint, "8,4") == cache_key(checkpoint, (8, 4))
    tokens, answers = prompt(loaded[1], 80), {}
    for _ in range(2):
        for format, key in keys.items():
            engine = Engine(*loaded, kv_bits=format, disk_cache=PromptCache(tmp_path, key))
            responses = list(engine.stream(tokens, 6))
            answer = [response.token for response in responses]
            known = responses[-1].cached_tokens
            assert known == (79 if format in answers else 0) and answers.setdefault(format, answer) == answer


@pytest.mark.parametrize(
    "format",
    [pytest.param(format, marks=[] if format.value == "8,4 rotated" else pytest.mark.long) for format in ALL],
    ids=lambda format: str(format.value).replace(" ", "-"),
)
def test_a_batch_writes_what_one_at_a_time_does(loaded: Any, format: KVFormat) -> None:
    """With a beginning that rows share."""
    model, tokenizer = loaded
    head = prompt(tokenizer, 300)
    prompts = [head + prompt(tokenizer, 20 + 9 * i, start=1000 * i)[1:] for i in range(3)] + [prompt(tokenizer, 33)]
    alone = {}
    for i, tokens in enumerate(prompts):
        responses = Engine(model, tokenizer, kv_bits=format).stream(tokens, 8)
        alone[i] = "".join(response.text for response in responses)
    requests = [Request(i, tokens, str(i)) for i, tokens in enumerate(prompts)]
    answers = generate_batch(model, tokenizer, requests, kv_bits=format, max_tokens=8, batch_size=3)
    assert {answer["id"]: answer["text"] for answer in answers} == alone


def test_group_sizes() -> None:
    assert [group_size(dims) for dims in (32, 64, 96, 128, 160)] == [32, 64, 32, 64, 32]


def test_a_command_with_every_spelling(stdlib_llama: Path, run: Any, tmp_path: Path) -> None:
    texts = {}
    for bits in ("8", "8,4", "4"):
        for rotate in ([], ["--kv-rotate"]):
            flags = ["--prompt", "import os\n", "--max-tokens", 8, "--kv-bits", bits, *rotate, "--json"]
            code, out, err = run("generate", "-m", stdlib_llama, *flags, "--prompt-cache", tmp_path)
            assert code == 0, err
            texts[bits, bool(rotate)] = json.loads(out)["text"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    code, _, err = run("generate", "-m", stdlib_llama, "--prompt", "a", "--kv-rotate")
    assert code == 2 and err == "error: rotation is for a quantized KV cache: give --kv-bits 4\n"
