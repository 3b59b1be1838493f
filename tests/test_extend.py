"""Going past the context by a position map: refusals, the plan, the disk cache, chunks, caches of mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, generate, plan_memory
from mlx_resonance.errors import UsageError
from mlx_resonance.generation import Engine, PromptCache
from mlx_resonance.generation.prompt_cache import cache_identity
from mlx_resonance.generation.quantized_cache import QuantizedCache
from mlx_resonance.positions import METHODS, PositionMap
from mlx_resonance.rope_types import LONGEST

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from .checkpoints import source

LONG = source()[4000:8000]  # about 1100 tokens


def test_a_prompt_past_the_context_is_refused_with_both_ways_and_their_costs(checkpoint: Path, run: Any) -> None:
    asked = ["generate", "-m", checkpoint, "-p", LONG, "--max-tokens", "4"]
    code, out, err = run(*asked)
    assert (code, out) == (2, "")
    factor = "--factor 3 (which changes the angles of short texts, too)"
    assert f"give {factor} or --extend dynamic (which keeps every angle; a longer text" in err
    for extend in METHODS:
        assert run(*asked, "--extend", extend)[0] == 0
    code, _, err = run(*asked, "--extend", "self-extend:100:1")
    assert (
        code == 2 and "exceed the 512 tokens that self-extend:100:1 serves: give --extend self-extend:100:8 or" in err
    )
    code, _, err = run(*asked, "--extend", "yarn")
    assert code == 2 and err.splitlines()[-1].endswith("got 'yarn' (--extend)")


def test_angles_and_context_of_a_map_and_of_a_scaling_together(checkpoint: Path) -> None:
    stretched = Checkpoint.open(checkpoint, factor=2, extend="dynamic")
    positions = stretched.rope.positions
    assert positions is not None and positions.trained == 1024 and stretched.rope.base_type == "yarn"
    assert stretched.rope.context_length == LONGEST and stretched.rope.own_context == 1024
    assert stretched.rope.frequencies() == Checkpoint.open(checkpoint, factor=2).rope.frequencies()
    assert stretched.results_digest() != Checkpoint.open(checkpoint, factor=2).results_digest()
    assert stretched.extended(None).results_digest() == Checkpoint.open(checkpoint, factor=2).results_digest()
    assert "extend" not in json.dumps(dict(stretched.mlx_config))  # nothing that is written has it
    assert stretched.rescaled(4).rope.positions is None


def test_the_plan_counts_keys_twice_past_the_context(checkpoint: Path) -> None:
    own, extended = Checkpoint.open(checkpoint), Checkpoint.open(checkpoint, extend="dynamic")
    assert plan_memory(extended, 512).kv == plan_memory(own, 512).kv
    for bits, share in ((None, 1.5), (8, 1.5), ("8,4", 1 + 8.5 / 13)):
        past, plain = (plan_memory(which, 2000, kv_bits=bits).kv for which in (extended, own))
        assert past == pytest.approx(share * plain, rel=1e-3)
    assert plan_memory(extended).context == 2048 and plan_memory(own).context == 512


@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=pytest.mark.long)])
def test_texts_on_disk_are_those_of_the_method(checkpoint: Path, tmp_path: Path, bits: int | None) -> None:
    """Within the context `dynamic` shares those of the plain model, both ways; past it nothing is shared."""
    counts: dict[str, int] = {}
    texts: dict[str, list[str]] = {}

    def ask(extend: str | None, tokens: list[int], folder: Path) -> int:
        opened = Checkpoint.open(checkpoint, extend=extend)
        cache = PromptCache(folder, **cache_identity(opened, bits))
        engine = Engine(opened.load(), opened.tokenizer, kv_bits=bits, disk_cache=cache, prompt_lookup="off")
        answer = list(engine.stream(tokens, 8))
        texts.setdefault(f"{extend} {len(tokens)}", []).append("".join(part.text for part in answer))
        return answer[-1].cached_tokens

    ids = Checkpoint.open(checkpoint).tokenizer.encode(LONG)
    short, long = ids[:400], ids[:900]
    assert ask("dynamic", short, tmp_path / "one") == 0 < ask(None, short, tmp_path / "one")
    assert ask("dynamic", long, tmp_path / "one") >= 399  # the beginning that the plain model shares
    counts = {extend: ask(extend, long, tmp_path / "one") for extend in ("dynamic", "dca", "self-extend")}
    assert counts == {"dynamic": 899, "dca": 0, "self-extend": 0}
    assert ask("dynamic:100", long, tmp_path / "one") == 512  # another window: the same within the context
    assert ask(None, ids[:480], tmp_path / "one") == 479  # of what `dynamic` wrote
    fresh = {extend: ask(extend, long, tmp_path / "two" / extend) for extend in ("dynamic", "dca", "self-extend")}
    assert set(fresh.values()) == {0}
    assert all(len(set(said)) == 1 for said in texts.values()), texts


@pytest.mark.parametrize("extend", METHODS)
@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=pytest.mark.long)])
def test_the_same_text_for_chunks_of_any_size(checkpoint: Path, extend: str, bits: int | None) -> None:
    """In float32, greedily; with prompt lookup, too, and where the last text's cache is trimmed and reused."""
    opened = Checkpoint.open(checkpoint).extended(extend, 1200)
    model = opened.load()
    model.set_dtype(mx.float32)
    ids, texts = opened.tokenizer.encode(LONG), set()
    for step, lookup in ((2048, "off"), (100, "off"), (333, 6)):
        engine = Engine(model, opened.tokenizer, kv_bits=bits, prefill_step_size=step, prompt_lookup=lookup)
        if step == 100:
            list(engine.stream([*ids[:700], *ids[:200]], 4))  # its beginning is reused
        answer = list(engine.stream(ids[:900], 24))
        assert step != 100 or answer[-1].cached_tokens == 700
        texts.add("".join(part.text for part in answer))
    assert len(texts) == 1 and texts.pop()


def test_caches_of_mlx_lm(checkpoint: Path) -> None:
    """Plain ones work, with keys that are moved at every pass; quantized ones become ours, or are refused by name."""
    opened = Checkpoint.open(checkpoint, extend="dynamic")
    model, ids = opened.load(), opened.tokenizer.encode(LONG)[:700]
    options: dict[str, Any] = {"max_tokens": 6, "prompt_lookup": "off"}
    own = generate(model, opened.tokenizer, ids, **options)
    assert generate(model, opened.tokenizer, ids, prompt_cache=make_prompt_cache(model), **options) == own
    caches = make_prompt_cache(model)
    quantized = generate(model, opened.tokenizer, ids, prompt_cache=caches, kv_bits=8, **options)
    assert all(isinstance(cache, QuantizedCache) for cache in caches)
    assert quantized == generate(model, opened.tokenizer, ids, kv_bits=8, **options)
    with pytest.raises(UsageError, match="a quantized cache of mlx-lm keeps no keys for other positions"):
        model(mx.array([ids]), cache=[QuantizedKVCache() for _ in model.layers])


def test_results_of_another_rule_for_the_group_are_not_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On-disk KV caches and run logs know a model by this digest."""
    extended = {extend: Checkpoint.open(checkpoint, extend=extend) for extend in ("dynamic", "self-extend:128:8")}
    before = {extend: opened.results_digest() for extend, opened in extended.items()}
    monkeypatch.setattr(PositionMap, "kept", property(lambda self: self.trained))
    changed = [extend for extend, opened in extended.items() if opened.results_digest() != before[extend]]
    assert changed == ["dynamic"]  # the other has its group in what the user wrote
    assert extended["dynamic"].settings()["rope"]["kept"] == 512
