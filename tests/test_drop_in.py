"""`stream_generate` and `generate` instead of mlx-lm's: every argument does the same, or is refused with a reason."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_resonance
from mlx_resonance import generate, load, stream_generate
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import PromptCache
from mlx_resonance.generation.kv_format import KVFormat
from mlx_resonance.generation.prefill import Pace
from mlx_resonance.generation.quantized_cache import QuantizedCache

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from .checkpoints import prompt

Options = Callable[[Any], dict[str, Any]]  # of a model; made anew for each side

# What mlx-lm's function makes of the same argument. It has to be told to quantize from token 0, and does so after its
# first chunk; with 8 bits that makes no other text.
EQUAL: dict[str, Options] = {
    "max_tokens": lambda model: {"max_tokens": 5},
    "stream": lambda model: {"stream": mx.default_stream(mx.default_device())},
    "sampler": lambda model: {"sampler": make_sampler(temp=0.9, top_p=0.95, top_k=40, min_p=0.01)},
    "logits_processors": lambda model: {
        "logits_processors": make_logits_processors(repetition_penalty=1.3, repetition_context_size=200)
    },
    "prompt_cache": lambda model: {"prompt_cache": make_prompt_cache(model)},
    "prefill_step_size": lambda model: {"prefill_step_size": 7},
    "kv_bits": lambda model: {"kv_bits": 8},
    "kv_group_size": lambda model: {"kv_bits": 8, "kv_group_size": 64},
    "quantized_kv_start": lambda model: {"kv_bits": 8, "quantized_kv_start": 0},
    "num_draft_tokens": lambda model: {"num_draft_tokens": 3},
}
REFUSED: list[tuple[Options, str]] = [
    (lambda model: {"max_tokens": -1}, "max_tokens must be at least 1, got -1"),
    (lambda model: {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    (lambda model: {"max_kv_size": 64}, "max_kv_size is not supported: .* drop the beginning"),
    (lambda model: {"input_embeddings": mx.zeros((4, 256))}, "input_embeddings is not supported: a prompt is read"),
    (lambda model: {"kv_bits": 3}, "kv_bits must be 4 or 8, got 3"),
    (lambda model: {"kv_bits": (8, 2)}, "kv_bits must be 4 or 8, got 2"),
    (lambda model: {"kv_rotate": True}, "rotation is for a quantized KV cache: try kv_bits=4"),
    (lambda model: {"kv_bits": 8, "kv_group_size": 32}, "kv_group_size must be 64 for this head size, got 32"),
    (lambda model: {"kv_bits": 8, "quantized_kv_start": 5000}, "quantized_kv_start must be 0: all tokens"),
    (lambda model: {"prompt_cache": make_prompt_cache(model)[:3]}, "a list of 5 caches, one per layer, got 3 of them"),
    (lambda model: {"prompt_cache": KVCache()}, "a list of 5 caches, one per layer, got KVCache"),
    (lambda model: {"prompt_cache": [BatchKVCache([0])] * 5}, "the same number of tokens of one text in every layer"),
    (lambda model: {"prompt_cache": [RotatingKVCache(64)] * 5}, "rotating cache of 64 .* a text of 66"),
    (lambda model: {"prompt_cache": [QuantizedKVCache()] * 5, "kv_bits": 4}, "have 8 bits, kv_bits asks for 4"),
    (lambda model: {"prompt_cache": [QuantizedKVCache()] * 5, "kv_bits": "8,4"}, "8 bits, kv_bits asks for 8,4"),
    (lambda model: {"sampler": make_sampler(), "temp": 0.0}, "give either a sampler or temp and top_p"),
    (lambda model: {"sampler": make_sampler(), "top_p": 0.5}, "give either a sampler or temp and top_p"),
]
OTHERWISE = {"prompt_progress_callback", "verbose", "draft_model"}  # tests of their own
IS_0_31 = (
    "stream" not in inspect.signature(generate_step).parameters
)  # it shows a processor the end of a prompt, not all of it


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load(checkpoint)


@pytest.fixture(scope="module")
def tokens(loaded: Any) -> list[int]:
    return prompt(loaded[1], 50)


def told(function: Any, *arguments: Any, seed: int = 3, **options: Any) -> list[tuple[Any, ...]]:
    """What the responses say, apart from times and memory."""
    mx.random.seed(seed)
    return [
        (one.text, one.token, one.from_draft, one.prompt_tokens, one.generation_tokens, one.finish_reason)
        for one in function(*arguments, **{"max_tokens": 16} | options)
    ]


def test_every_argument_of_mlx_lm_is_covered() -> None:
    """A new version of mlx-lm may add some."""
    functions = (mlx_lm.generate, mlx_lm.stream_generate, generate_step, speculative_generate_step)
    theirs = set().union(*(inspect.signature(function).parameters for function in functions))
    covered = EQUAL.keys() | OTHERWISE | {"max_kv_size", "input_embeddings"}
    assert covered == theirs - {"model", "tokenizer", "prompt", "kwargs"} | ({"stream"} if IS_0_31 else set())
    for ours, its in ((stream_generate, mlx_lm.stream_generate), (generate, mlx_lm.generate)):
        order = [name for name, one in inspect.signature(its).parameters.items() if one.kind is not one.VAR_KEYWORD]
        assert list(inspect.signature(ours).parameters)[: len(order)] == order


@pytest.mark.parametrize("name", sorted(EQUAL.keys() - ({"stream", "logits_processors"} if IS_0_31 else set())))
def test_an_argument_does_the_same(loaded: Any, tokens: list[int], name: str) -> None:
    ours, its = EQUAL[name](loaded[0]), EQUAL[name](loaded[0]) | {"quantized_kv_start": 0}
    found = told(stream_generate, *loaded, tokens, **ours)
    assert found == told(mlx_lm.stream_generate, *loaded, tokens, **its)
    assert len(found) == ours.get("max_tokens", 16)
    if name in ("sampler", "logits_processors"):
        assert found != told(stream_generate, *loaded, tokens)


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_an_argument_is_refused_with_a_reason(loaded: Any, tokens: list[int], options: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        stream_generate(*loaded, tokens, **{"max_tokens": 16} | options(loaded[0]))
    assert "\n" not in str(error.value)


def test_an_unknown_argument_is_a_type_error(loaded: Any, tokens: list[int]) -> None:
    with pytest.raises(TypeError, match="max_token"):
        stream_generate(*loaded, tokens, max_token=16)


@pytest.mark.parametrize("kind", [str, list, mx.array])
def test_prompts_and_tokenizers_of_every_kind(loaded: Any, tokens: list[int], kind: Any) -> None:
    model, tokenizer = loaded
    given = "import os\n\n\ndef main" if kind is str else kind(tokens)
    expected = told(mlx_lm.stream_generate, model, tokenizer, given)
    assert told(stream_generate, model, tokenizer, given) == expected
    assert told(stream_generate, model, tokenizer._tokenizer, given) == expected
    assert generate(model, tokenizer, given, max_tokens=16) == "".join(text for text, *_ in expected)


@pytest.mark.parametrize("length", [1, 2, 50])
def test_processors_see_the_whole_prompt(loaded: Any, tokens: list[int], length: int) -> None:
    """This one ends the text after five tokens, by their number."""
    seen: list[list[int]] = []
    end = mx.arange(2048) == loaded[1].eos_token_id

    def process(before: mx.array, logits: mx.array) -> mx.array:
        seen.append(before.tolist())
        return mx.where(end, 100.0, logits) if before.size >= length + 5 else logits

    found, ours = told(stream_generate, *loaded, tokens[:length], logits_processors=[process]), seen.copy()
    seen.clear()
    if not IS_0_31:
        assert found == told(mlx_lm.stream_generate, *loaded, tokens[:length], logits_processors=[process])
        assert ours == seen
    assert [len(tokens) for tokens in ours[:6]] == list(range(length, length + 6)) and ours[0] == tokens[:length]
    assert len(found) == 6 and found[-1][-1] == "stop"


def test_the_callback_is_called_alike(loaded: Any, tokens: list[int]) -> None:
    calls: dict[Any, list[tuple[int, int]]] = {}
    for function in (stream_generate, mlx_lm.stream_generate):
        seen = calls.setdefault(function, [])
        told(function, *loaded, tokens, prefill_step_size=20, prompt_progress_callback=lambda *at: seen.append(at))  # noqa: B023
    assert calls[stream_generate] == calls[mlx_lm.stream_generate] == [(n, 50) for n in (0, 20, 40, 49, 50)]


@pytest.mark.parametrize("ends_at_once", [False, True])
def test_verbose_prints_the_same(
    loaded: Any, tokens: list[int], ends_at_once: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bias = {loaded[1].eos_token_id: 100.0} if ends_at_once else None
    options = {"max_tokens": 8, "verbose": True, "logits_processors": make_logits_processors(bias)}
    printed = []
    for function in (generate, mlx_lm.generate):
        text = function(*loaded, tokens, **options)
        printed.append(re.sub(r"\d+\.\d{3} ", "… ", capsys.readouterr().out))
        assert not text if ends_at_once else text in printed[-1]
    assert printed[0] == printed[1] and ("Peak memory: … GB" in printed[0]) == (not ends_at_once)


def test_memory_is_in_mlx_lms_unit(loaded: Any, tokens: list[int]) -> None:
    *_, last = stream_generate(*loaded, tokens, max_tokens=2)
    assert last.peak_memory == pytest.approx(mx.get_peak_memory() / 1e9)


@pytest.mark.parametrize("first", [stream_generate, mlx_lm.stream_generate])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_cache_continues_its_text(loaded: Any, tokens: list[int], first: Any, kv_bits: int | None) -> None:
    """Two turns of ours, or ours after one of mlx-lm's, against two of mlx-lm's."""
    model, tokenizer = loaded
    ours, its = (make_prompt_cache(model) for _ in range(2))
    if kv_bits is not None:
        ours[:], its[:] = ([QuantizedKVCache(64, kv_bits) for _ in model.layers] for _ in range(2))
    follow_up = prompt(tokenizer, 40, start=1000)[1:]
    assert told(first, *loaded, tokens, prompt_cache=ours) == told(
        mlx_lm.stream_generate, *loaded, tokens, prompt_cache=its
    )
    held, calls = ours[0].offset, []
    found = told(
        stream_generate, *loaded, follow_up, prompt_cache=ours, prompt_progress_callback=lambda *at: calls.append(at)
    )
    assert found == told(mlx_lm.stream_generate, *loaded, follow_up, prompt_cache=its)
    assert found != told(mlx_lm.stream_generate, *loaded, follow_up)  # without the first turn
    assert calls == [(0, 39), (38, 39), (39, 39)]
    assert {layer.offset for layer in ours} == {layer.offset for layer in its} == {held + 39 + 16}


def test_kv_bits_quantizes_a_cache_in_its_list(loaded: Any, tokens: list[int]) -> None:
    ours, its = (make_prompt_cache(loaded[0]) for _ in range(2))
    for function, cache in ((stream_generate, ours), (mlx_lm.stream_generate, its)):
        told(function, *loaded, tokens, prompt_cache=cache)
    found = told(stream_generate, *loaded, tokens, prompt_cache=ours, kv_bits=8)
    assert found == told(mlx_lm.stream_generate, *loaded, tokens, prompt_cache=its, kv_bits=8, quantized_kv_start=0)
    assert [(type(layer), layer.bits, layer.offset) for layer in ours] == [(QuantizedKVCache, 8, 132)] * 5


@pytest.mark.parametrize(("kv_bits", "kv_rotate"), [((8, 4), False), ("8,4", True), (8, True)])
def test_a_format_that_mlx_lm_lacks_quantizes_a_cache_in_its_list(
    loaded: Any, tokens: list[int], kv_bits: Any, kv_rotate: bool
) -> None:
    format, cache = KVFormat.of(kv_bits, kv_rotate), make_prompt_cache(loaded[0])
    told(mlx_lm.stream_generate, *loaded, tokens, prompt_cache=cache)
    held = cache[0].offset
    for turn in (1, 2):
        options = {"kv_bits": kv_bits, "kv_rotate": kv_rotate, "max_tokens": 4}
        told(stream_generate, *loaded, tokens[1:21], prompt_cache=cache, **options)
        assert {(type(layer), layer.format) for layer in cache} == {(QuantizedCache, format)}
        assert {layer.offset for layer in cache} == {held + 24 * turn}
    for other in (8, 4, None):
        if KVFormat.of(other) != format:
            with pytest.raises(UsageError, match="the caches have"):
                told(stream_generate, *loaded, tokens[1:21], prompt_cache=cache, kv_bits=other or "4,8")


def test_the_context_counts_the_cached_tokens(loaded: Any, tokens: list[int]) -> None:
    cache = make_prompt_cache(loaded[0])
    told(stream_generate, *loaded, [5] * 400, prompt_cache=cache)
    told(stream_generate, *loaded, tokens, prompt_cache=cache, max_tokens=46)
    assert cache[0].offset == 512
    with pytest.raises(UsageError, match=r"512 cached tokens, 1 prompt tokens and 1 new ones exceed .* 512 tokens"):
        stream_generate(*loaded, [5], prompt_cache=cache, max_tokens=1)


def test_an_interrupt_leaves_whole_chunks_in_the_cache(loaded: Any, tokens: list[int]) -> None:
    cache, block = make_prompt_cache(loaded[0]), loaded[0].layers[3].self_attn
    told(stream_generate, *loaded, tokens, prompt_cache=cache)
    call, count = type(block).__call__, 0

    def fail(self: Any, *arguments: Any, **options: Any) -> mx.array:
        nonlocal count
        count += self is block
        if count == 3:
            raise KeyboardInterrupt
        return call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block), "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            told(stream_generate, *loaded, tokens, prompt_cache=cache, prefill_step_size=10)
    assert {layer.offset for layer in cache} == {50 + 16 + 2 * 10}


def test_the_pace_knows_of_the_cached_tokens(loaded: Any, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, asked = make_prompt_cache(loaded[0]), list[int]()
    told(stream_generate, *loaded, tokens, prompt_cache=cache)
    monkeypatch.setattr(Pace, "size", lambda self, done: asked.append(done) or 20)
    told(stream_generate, *loaded, tokens, prompt_cache=cache)
    assert asked == [66, 86, 106]


def test_the_two_caches_are_not_mistaken(loaded: Any, tokens: list[int], tmp_path: Path) -> None:
    kept = PromptCache(tmp_path, "key")
    with pytest.raises(UsageError, match="give a PromptCache as disk_cache"):
        stream_generate(*loaded, tokens, prompt_cache=kept)
    with pytest.raises(UsageError, match="either prompt_cache or disk_cache"):
        stream_generate(*loaded, tokens, prompt_cache=make_prompt_cache(loaded[0]), disk_cache=kept)


def test_angles_that_change_with_the_length_do_not_continue_a_cache(random_llama: Path, copy_of: Any) -> None:
    scaling = {"rope_type": "dynamic", "factor": 8.0}
    model, tokenizer = load(copy_of(random_llama, rope_scaling=scaling, rope_parameters=None))
    cache = make_prompt_cache(model)
    told(stream_generate, model, tokenizer, [5] * 20, prompt_cache=cache)
    with pytest.raises(UsageError, match="change with the length of a text"):
        stream_generate(model, tokenizer, [5] * 20, prompt_cache=cache)


def test_every_public_name_is_shown_and_imported() -> None:
    names, space = set(mlx_resonance.__all__), dict[str, Any]()
    assert {"Checkpoint", "generate", "install"} < names <= set(dir(mlx_resonance))
    assert names == {name for name in dir(mlx_resonance) if not name.startswith("__")}
    exec("from mlx_resonance import *", space)
    assert space.keys() - {"__builtins__"} == names
