"""install(): files of mlx-lm that are not adapted compute the angles that config.json asks for, or are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import RopeConfig, generate, load, mlx_lm_models

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from .checkpoints import prompt
from .pretend import pretend_gpu
from .random_models import FACTOR, LENGTH, ORIGINAL, SIZES, make

ORIGINAL_KEY = "original_max_position_embeddings"


def asked(kind: str, **rope: Any) -> dict[str, Any]:
    return {"model_type": kind} | SIZES | {"num_experts_per_tok": 2, "num_local_experts": 4} | rope


def load_config(tmp_path: Path, config: dict[str, Any]) -> Any:
    """What mlx-lm makes of a config.json: the model, or the error."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    return mlx_lm.utils.load_model(tmp_path, lazy=True, strict=False)[0]


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (asked("mixtral", rope_scaling=YARN), "mixtral .* rope type yarn"),
        (asked("mixtral", rope_parameters=YARN | {"rope_theta": 1e6}), "mixtral .* rope type yarn"),
        (asked("mixtral", rope_scaling={"rope_type": "resonance_default"}), "mixtral .* rope type resonance_default"),
        (asked("gemma2", rope_scaling={"type": "linear", "factor": 2.0}), "gemma2 .* rope type linear"),
        (asked("qwen3_moe", rope_scaling=YARN | {"rope_type": "resonance_yarn"}), "qwen3_moe .* resonance_yarn"),
        (asked("phi3", rope_scaling=YARN | {"rope_type": "resonance_yarn"}), "phi3 .* resonance_yarn"),
        (asked("phi3", rope_scaling=YARN), "phi3 .* rope type yarn|must contain keys"),
        (asked("llama", rope_scaling=YARN | {"llama_4_scaling_beta": 0.1}), "llama_4_scaling_beta"),
        (asked("olmo2", rope_scaling=YARN | {"llama_4_scaling_beta": 0.1}), "olmo2 .* llama_4_scaling_beta"),
        (asked("llama", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}), "mrope"),
        (asked("olmo2", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}), "olmo2 .* mrope"),
        (asked("llama", rope_scaling={"rope_type": "proportional"}), "proportional"),
        (asked("mixtral", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary"),
    ],
)
def test_angles_that_a_file_does_not_compute_are_refused_by_name(
    config: dict[str, Any], named: str, tmp_path: Path, installed: None
) -> None:
    with pytest.raises(ValueError, match=named):
        load_config(tmp_path, config)


def test_a_config_that_asks_for_nothing_special_is_left_alone(tmp_path: Path, installed: None) -> None:
    model = load_config(tmp_path, asked("mixtral", rope_theta=20000.0))
    assert type(model.layers[0].self_attn.rope).__module__ == "mlx.nn.layers.positional_encoding"
    model = load_config(tmp_path, asked("mixtral", rope_parameters={"rope_type": "default", "rope_theta": 30000.0}))
    assert model.layers[0].self_attn.rope.base == 30000.0


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_a_file_that_calls_initialize_rope_gets_exact_angles(style: str, tmp_path: Path, installed: None) -> None:
    scaling = YARN | {"attention_factor": 1.3} | ({"rope_theta": 20000.0} if style == "rope_parameters" else {})
    base = {} if style == "rope_parameters" else {"rope_theta": 20000.0}
    model = load_config(tmp_path, asked("olmo2", **{style: scaling}, **base))
    expected = RopeConfig.from_hf(SIZES | base | {style: scaling}).frequencies()
    assert model.layers[0].self_attn.rope.frequencies == expected and expected.attention_scale == 1.3


def test_the_language_part_of_a_vision_model_is_read_too(tmp_path: Path, installed: None) -> None:
    text = asked("mistral", rope_parameters=YARN | {"rope_theta": 20000.0}) | {"layer_types": None}
    weight = {"language_model.model.norm.weight": mx.ones(SIZES["hidden_size"])}  # mlx-lm 0.31 fails without one
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weight)
    model = load_config(tmp_path, {"model_type": "mistral3", "text_config": text})
    expected = RopeConfig.from_hf(SIZES | {"rope_parameters": YARN | {"rope_theta": 20000.0}}).frequencies()
    assert model.layers[0].self_attn.rope.frequencies == expected
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 30000.0}
    model = load_config(tmp_path, {"model_type": "mistral3", "text_config": text})
    assert model.layers[0].self_attn.rope.base == 30000.0


def test_phi3_keeps_its_own_longrope(tmp_path: Path, installed: None) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    scaling = {"type": "longrope", **factors}
    config = asked("phi3", rope_scaling=scaling, original_max_position_embeddings=64) | {"head_dim": None}
    model = load_config(tmp_path, config)
    assert type(model.layers[0].self_attn.rope).__name__ == "SuScaledRoPE"


BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
}
GEMMA3 = {"query_pre_attn_scalar": 16, "sliding_window": 16, "sliding_window_pattern": 2}
MINICPM3 = {
    "dim_model_base": 32, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "kv_lora_rank": 16,
    "scale_depth": 1.4, "scale_emb": 1, "rope_theta": 10000.0,
}  # fmt: skip
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def test_a_scaling_for_single_layers_that_a_file_drops_is_refused(tmp_path: Path, installed: None) -> None:
    with pytest.raises(ValueError, match="gemma3_text model does not compute the angles of rope type linear"):
        load_config(tmp_path, asked("gemma3_text", rope_parameters=BY_LAYER) | GEMMA3)
    load_config(tmp_path, asked("gemma3_text", rope_theta=1e6) | GEMMA3)


def test_a_base_that_a_file_does_not_read_is_refused(tmp_path: Path, installed: None) -> None:
    config = asked("gemma3_text", rope_parameters={"rope_type": "default", "rope_theta": 54321.0}) | GEMMA3
    del config["rope_parameters"]["rope_type"]
    load_config(tmp_path, config)  # its file has this key
    with pytest.raises(ValueError, match=r"does not read rope_theta, which config\.json sets to 54321"):
        mlx_lm_models.check_built(nn.Sequential(nn.RoPE(8)), {"model_type": "any", "rope_theta": 54321.0})


@pytest.mark.parametrize(
    ("config", "module"),
    [
        (asked("minicpm3", rope_scaling={"type": "longrope", ORIGINAL_KEY: 64, **FACTORS}) | MINICPM3, "SuScaledRoPE"),
        (
            asked("ministral3", rope_parameters=YARN | {"type": "yarn", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1})
            | {"layer_types": None},
            "ResonanceRoPE",
        ),
    ],
    ids=["its own module", "its own key"],
)
def test_what_a_file_computes_itself_is_left_to_it(
    config: dict[str, Any], module: str, tmp_path: Path, installed: None
) -> None:
    model = load_config(tmp_path, config)
    assert {type(part).__name__ for _, part in model.named_modules() if "RoPE" in type(part).__name__} == {module}


def test_phi3_finds_its_original_context_in_either_style(tmp_path: Path, installed: None) -> None:
    long = {"rope_type": "longrope", ORIGINAL_KEY: 64, **FACTORS}
    shared = asked("phi3") | {"head_dim": None}
    style_4 = shared | {"rope_scaling": {"type": "longrope", **FACTORS}, ORIGINAL_KEY: 64}
    scales = [
        load_config(tmp_path, config).layers[0].self_attn.rope._scale
        for config in (style_4, shared | {"rope_parameters": long | {"rope_theta": 10000.0}})
    ]
    assert scales[0] == scales[1] > 1


def test_angles_that_change_with_the_length_are_never_mixed(tmp_path: Path, installed: None) -> None:
    """mlx-lm reads a prompt in passes and rows together without telling the length: refused, not other angles."""
    long = {"factor": 8.0, ORIGINAL_KEY: ORIGINAL, **FACTORS}
    rope = RopeConfig(16, "longrope", max_position_embeddings=ORIGINAL * FACTOR, parameters=long)
    folder = make(tmp_path / "model", "llama", rope, "4")
    model, tokenizer = mlx_lm.load(str(folder))
    ours, tokens = load(folder)[0], prompt(tokenizer, LENGTH)
    assert generate(ours, tokenizer, tokens, max_tokens=4) == generate(
        ours, tokenizer, tokens, max_tokens=4, prefill_step_size=50
    )
    cache = make_prompt_cache(model)
    model(mx.array([tokens[:50]]), cache=cache)
    with pytest.raises(ValueError, match="need it to be read in one pass"):
        model(mx.array([tokens[50:]]), cache=cache)
    batch = [BatchKVCache([0, 250]) for _ in model.layers]
    with pytest.raises(ValueError, match="do not serve rows of several lengths"):
        model(mx.array([tokens, tokens]), cache=batch)
    command = [Path(sys.executable).with_name("mlx-resonance"), "lm", "server", "--model", folder, "--port", "0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "angles of longrope change with the length" in errors[0]


def test_mlx_lms_own_loops_launch_the_bare_kernel(
    extended: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text or several: their steps cost no more than with mlx-lm's own rotation."""
    model, tokenizer = mlx_lm.load(str(extended))
    prompts = [tokenizer.encode(text) for text in ("def f(x):", "import os\nimport sys\n")]

    def texts() -> list[str]:
        alone = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=8) for prompt in prompts]
        return [*alone, *mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=8).texts]

    expected, launches = texts(), pretend_gpu(monkeypatch)
    assert texts() == expected
    assert launches["transformable"] == 0 and launches["all"] >= 3 * 8 * len(model.layers)
