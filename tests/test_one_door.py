"""Every way to open a checkpoint gives the same logits: random rope settings, in both styles of config.json."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, RopeConfig, convert, files, generate, load, mlx_lm_models
from mlx_resonance.generation.batch import Request, generate_batch
from mlx_resonance.run_log import read_run_log

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import granite, llama, qwen2, qwen3, smollm3
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from .checkpoints import STDLIB_LLAMA, source

ORIGINAL, FACTOR, LENGTH = 64, 8, 300
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 2048, "tie_word_embeddings": True,
    "max_position_embeddings": ORIGINAL * FACTOR,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
MODELS = {
    "llama": (llama, {}),
    "mistral": (llama, {}),
    "qwen2": (qwen2, {}),
    "qwen3": (qwen3, {}),
    "smollm3": (smollm3, {}),
    "granite": (granite, GRANITE),
}


def random_rope(seed: int) -> RopeConfig:
    """Any rope type with any of its options, rounded or not."""
    draw = np.random.default_rng(seed)

    def some(**options: list[Any]) -> dict[str, Any]:
        return {name: values[draw.integers(len(values))] for name, values in options.items() if draw.random() < 0.6}

    original = {"factor": float(FACTOR), "original_max_position_embeddings": ORIGINAL}
    yarn = some(beta_fast=[8, 32], beta_slow=[1, 2], truncate=[True, False]) | some(attention_factor=[0.9, 1.2])
    if "attention_factor" not in yarn:
        yarn |= {"mscale": 1.0, "mscale_all_dim": 0.5} if draw.random() < 0.3 else {}
    longrope = {name: draw.uniform(1, 4, 8).round(3).tolist() for name in ("short_factor", "long_factor")}
    kinds = {
        "default": {},
        "linear": {"factor": 4.0},
        "ntk": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": original | yarn,
        "llama3": original | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": original | longrope,
    }
    name = list(kinds)[seed % len(kinds)]
    return RopeConfig(
        dims=16,
        rope_type=draw.choice(["", "resonance_"]) + name,
        base=float(draw.choice([10000.0, 500000.0, 1e6])),
        max_position_embeddings=ORIGINAL * FACTOR,
        parameters=kinds[name],
    )


def make(folder: Path, kind: str, rope: RopeConfig, style: str) -> Path:
    """A random checkpoint whose logits depend on positions, with the tokenizer of stdlib-llama."""
    file, extra = MODELS[kind]
    config = {"model_type": kind} | SIZES | extra
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STDLIB_LLAMA / name, folder / name)
    mx.random.seed(1)
    model = file.Model(file.ModelArgs.from_dict(config | {"rope_theta": rope.base}))
    weights = {name: mx.random.normal(value.shape) * 0.2 for name, value in tree_flatten(model.parameters())}
    weights |= {name: 1 + 0.1 * value for name, value in weights.items() if name.endswith("norm.weight")}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | rope.to_hf(style)))
    return folder


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    tokenizer = Checkpoint.open(STDLIB_LLAMA).tokenizer
    return list(tokenizer.encode(source()[: 8 * LENGTH]))[:LENGTH]


def last_log_probabilities(model: Any, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of the token after a text that is read in one pass."""
    logits = model(mx.array([tokens]))[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


def used_by(monkeypatch: pytest.MonkeyPatch, module: Any, command: Callable[[], Any]) -> Any:
    """The model that a command hands to mlx-lm's `stream_generate`."""
    models: list[Any] = []
    original = module.stream_generate

    def stream_generate(model: Any, *args: Any, **options: Any) -> Any:
        models.append(model)
        return original(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "stream_generate", stream_generate)
        command()
    return models[0]


@pytest.mark.parametrize("style", ["4", "5"])
@pytest.mark.parametrize("seed", [*range(7), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(7, 70))])
def test_every_entry_point_gives_the_same_logits(
    seed: int, style: str, tokens: list[int], tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    from mlx_lm import server

    rope = random_rope(seed)
    folder = make(tmp_path / "model", list(MODELS)[seed % 4], rope, style)  # those that `convert` compares
    expected = last_log_probabilities(load(folder)[0], tokens)
    other = Checkpoint.open(folder).with_rope(RopeConfig(16, base=12345.0, max_position_embeddings=512))
    assert np.abs(last_log_probabilities(other.load(), tokens) - expected).max() > 1e-2  # angles matter

    def check(name: str, model: Any) -> None:
        assert np.array_equal(last_log_probabilities(model, tokens), expected), name

    options = ("--model", folder, "--prompt", "import os", "--max-tokens", 2)
    check("Checkpoint", Checkpoint.open(folder).load())
    check("mlx_lm.load", mlx_lm.load(str(folder))[0])
    check("mlx_lm.utils.load_model", mlx_lm.utils.load_model(folder)[0])
    check("generate", used_by(monkeypatch, mlx_lm, lambda: run("generate", *options)))
    check("lm generate", used_by(monkeypatch, sys.modules["mlx_lm.generate"], lambda: run("lm", "generate", *options)))
    arguments = Namespace(
        model=str(folder), adapter_path=None, draft_model=None, trust_remote_code=False, chat_template=None,
        use_default_chat_template=False, chat_template_args={}, pipeline=False, allowed_origins=["*"],
    )  # fmt: skip
    check("lm server", server.ModelProvider(arguments).load("default_model", None, None)[0])
    code, _, err = run(
        "convert", folder, "--mlx-path", tmp_path / "out", *(["--no-resonance"] * (not rope.is_resonant))
    )
    assert code == 0, err
    check("convert", load(tmp_path / "out")[0])
    code, out, err = run("verify", tmp_path / "out", "--source", folder, "--json")
    assert code == 0 and json.loads(out)["logits"]["error"] < 5e-3, err


@pytest.mark.parametrize("style", ["4", "5"])
@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_and_batches_of_every_model(
    kind: str, style: str, tmp_path: Path, installed: None, run: Any
) -> None:
    rope = random_rope(4)  # yarn
    folder = make(tmp_path / "model", kind, rope, style)
    model, tokenizer = load(folder)
    tokens = list(tokenizer.encode(source()[: 8 * LENGTH]))[:LENGTH]  # Qwen's tokenizer splits differently
    logits = model(mx.array([tokens]))[0]
    losses = mx.logsumexp(logits[:-1], axis=-1) - mx.take_along_axis(logits[:-1], mx.array(tokens)[1:, None], -1)[:, 0]
    (tmp_path / "text.txt").write_text(source()[: 8 * LENGTH])
    output = tmp_path / "perplexity.jsonl"
    code, _, err = run(
        "eval", "perplexity", "--model", folder, "--data", tmp_path / "text.txt", "--contexts", LENGTH, "--truncate",
        "--output", output,
    )  # fmt: skip
    assert code == 0, err
    (line,) = read_run_log(output, "perplexity")[1]
    assert line["nll"] / line["tokens"] == pytest.approx(losses.mean().item(), rel=1e-5)
    (answer,) = generate_batch(model, tokenizer, [Request(1, tokens[:200], "")], max_tokens=8)
    assert answer["text"] == generate(model, tokenizer, tokens[:200], max_tokens=8)
    assert np.array_equal(
        last_log_probabilities(mlx_lm.load(str(folder))[0], tokens), last_log_probabilities(model, tokens)
    )


def test_layers_without_rope_stay_without(tmp_path: Path, tokens: list[int]) -> None:
    folder = make(tmp_path / "model", "smollm3", random_rope(4), "4")
    model = load(folder)[0]
    kinds = [type(layer.self_attn.rope).__name__ for layer in model.layers]
    assert kinds == ["ResonanceRoPE"] * 3 + ["NoPE"]


ORIGINAL_KEY = "original_max_position_embeddings"


# --- files of mlx-lm that are not adapted


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


def test_angles_that_change_with_the_length_are_never_mixed(
    tmp_path: Path, tokens: list[int], installed: None, run: Any
) -> None:
    """mlx-lm reads a prompt in passes and rows together without telling the length: refused, not other angles."""
    long = {"factor": 8.0, ORIGINAL_KEY: ORIGINAL, **FACTORS}
    rope = RopeConfig(16, "longrope", max_position_embeddings=ORIGINAL * FACTOR, parameters=long)
    folder = make(tmp_path / "model", "llama", rope, "4")
    model, tokenizer = mlx_lm.load(str(folder))
    ours = load(folder)[0]
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


# --- read once


OURS = (str(Path(files.__file__).parent), str(Path(convert.__file__).parent))
THEIRS = ("mlx_lm", "transformers", "huggingface_hub", "tokenizers")
opened: list[str] = []  # every config.json that our code opens


def note_open(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: a config.json counts as opened by the innermost caller that is ours or a library's."""
    if event == "open" and str(arguments[0]).endswith("config.json"):
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if any(f"/{library}/" in name for library in THEIRS):
                return
            if name.startswith(OURS):
                opened.append(str(arguments[0]))
                return
            frame = frame.f_back  # type: ignore[assignment]


sys.addaudithook(note_open)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The config.json files that our code opens from now on, and the weight files whose headers it reads."""
    opened.clear()
    safe_open = files.safe_open

    def count(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return safe_open(path, *args, **options)

    monkeypatch.setattr(files, "safe_open", count)
    return opened


COMMANDS: dict[str, tuple[Any, ...]] = {
    "generate": ("generate", "-m", "{model}", "--prompt", "import os", "--max-tokens", 2),
    "generate with a cache": (
        "generate", "-m", "{model}", "--prompt", "import os", "--max-tokens", 2, "--prompt-cache", "{new}",
    ),
    "generate for a file": (
        "generate", "-m", "{model}", "--prompts-file", "{prompts}", "--output", "{new}.jsonl", "--max-tokens", 2,
    ),
    "plan": ("plan", "-m", "{model}", "--memory", "4GB"),
    "inspect": ("inspect", "{model}"),
    "convert": ("convert", "{model}", "--mlx-path", "{new}", "--verify"),
    "perplexity": (
        "eval", "perplexity", "-m", "{model}", "--data", "{text}", "--contexts", "32,64", "--stride", 16, "--output",
        "{new}.jsonl", "--rope", "default,resonance_yarn", "--factor", 8,
    ),
    "passkey": (
        "eval", "passkey", "-m", "{model}", "--lengths", 300, "--repetitions", 1, "--depths", 0, "--output",
        "{new}.jsonl", "--factor", 8,
    ),
    "ruler": (
        "eval", "ruler", "-m", "{model}", "--lengths", 500, "--samples", 1, "--tasks", "niah_single_1", "--output",
        "{new}.jsonl", "--max-tokens", 2,
    ),
    "finetune": (
        "finetune", "-m", "{model}", "--data", "{text}", "--mlx-path", "{new}", "--length", 64, "--steps", 1,
        "--accumulate", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_config_and_headers_are_read_once(
    name: str, checkpoint: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(source()[:2000])
    (tmp_path / "prompts.jsonl").write_text('{"id": 1, "prompt": "import os"}\n')
    places = {"model": checkpoint, "new": tmp_path / "new"}
    places |= {"text": tmp_path / "text.txt", "prompts": tmp_path / "prompts.jsonl"}
    read = counted(monkeypatch)
    code, _, err = run(*(str(part).format(**places) for part in COMMANDS[name]))
    assert code == 0, err
    for file in ("config.json", "model.safetensors"):
        assert read.count(str(checkpoint / file)) == 1, read
    results = [path for path in read if not path.startswith(str(checkpoint)) and not path.endswith("config.json")]
    assert len(set(results)) == len(results), read  # including the headers of a verified result
