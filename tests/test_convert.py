"""The converter: what it writes, and which arguments and config.json it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mlx_resonance import Checkpoint, RopeConfig, load
from mlx_resonance.cli import convert as convert_command
from mlx_resonance.convert import convert
from mlx_resonance.convert.quantization import MODES
from mlx_resonance.convert.verify import DTYPES
from mlx_resonance.errors import UsageError
from mlx_resonance.scaling import SCALINGS

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard
from mlx.utils import tree_flatten
from mlx_lm.convert import QUANT_RECIPES

from . import oracle

TOKENS = mx.array([[0, 5, 77, 1024, 3, 9]])


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_sharded_checkpoint_becomes_one_file_with_the_same_weights(random_llama: Path, tmp_path: Path) -> None:
    assert len(list(random_llama.glob("model-*.safetensors"))) > 1
    done = convert(random_llama, tmp_path / "out")
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    source = {}
    for file in random_llama.glob("model-*.safetensors"):
        source |= mx.load(str(file))
    assert weights.keys() == source.keys()
    assert all(mx.array_equal(weights[name], source[name]) for name in source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: "model.safetensors" for name in source}
    assert (done.files, done.weights) == (1, (tmp_path / "out" / "model.safetensors").stat().st_size)


def test_tokenizer_files_are_copied_byte_for_byte(random_llama: Path, tmp_path: Path) -> None:
    convert(random_llama, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (random_llama / name).read_bytes(), name
    _, tokenizer = load(tmp_path / "out")
    assert tokenizer.has_chat_template


def test_shards_are_no_larger_than_asked_and_load_again(random_llama: Path, tmp_path: Path) -> None:
    done = convert(random_llama, tmp_path / "out", max_shard_size="0.6MB")
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert done.files == len(files) > 1
    assert max(file.stat().st_size for file in files) < 0.6e6 + 10_000  # plus the header
    whole = Checkpoint.open(random_llama).load()
    sharded = Checkpoint.open(tmp_path / "out").with_rope(whole.args.rope).load()
    assert mx.array_equal(whole(TOKENS), sharded(TOKENS))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(random_llama: Path, tmp_path: Path, dtype: str) -> None:
    convert(random_llama, tmp_path / "out", dtype=dtype)
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {getattr(mx, dtype)}
    assert config_of(tmp_path / "out")["dtype"] == config_of(tmp_path / "out")["torch_dtype"] == dtype


@pytest.mark.parametrize(
    ("options", "quantization"),
    [
        ({}, {"group_size": 64, "bits": 4, "mode": "affine"}),
        ({"q_bits": 8, "q_group_size": 32}, {"group_size": 32, "bits": 8, "mode": "affine"}),
        ({"q_mode": "mxfp4"}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        ({"q_mode": "nvfp4"}, {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
        ({"q_mode": "mxfp8"}, {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
        ({"quant_predicate": "mixed_4_6"}, {"group_size": 64, "bits": 4, "mode": "affine"}),
    ],
)
def test_quantized_logits_stay_near_the_source(
    random_llama: Path, tmp_path: Path, options: dict[str, Any], quantization: dict[str, Any]
) -> None:
    convert(random_llama, tmp_path / "out", quantize=True, resonance=False, **options)
    stored = config_of(tmp_path / "out")["quantization"]
    assert {key: stored[key] for key in quantization} == quantization
    assert ("quant_predicate" in options) == any(isinstance(value, dict) for value in stored.values())
    model = Checkpoint.open(tmp_path / "out").load()
    assert any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    reference = np.array(Checkpoint.open(random_llama).load()(TOKENS)).ravel()
    logits = np.array(model(TOKENS).astype(mx.float32)).ravel()
    # Random weights are the worst case for 4 bits; another model's logits would correlate at 0.
    assert np.corrcoef(reference, logits)[0, 1] > 0.9


def test_resonance_is_on_by_default_and_says_how_far_it_rounds(random_llama: Path, tmp_path: Path) -> None:
    done = convert(random_llama, tmp_path / "out", rope="yarn", factor=8)
    scaling = config_of(tmp_path / "out")["rope_scaling"]
    assert scaling == {
        "rope_type": "resonance_yarn",
        "factor": 8,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    assert config_of(tmp_path / "out")["max_position_embeddings"] == 1024 == done.rope.context_length
    wavelengths = done.rope.unrounded_frequencies().wavelengths
    assert done.largest_shift == pytest.approx(np.max(np.abs(np.rint(wavelengths) / wavelengths - 1)))
    assert convert(tmp_path / "out", tmp_path / "again").largest_shift == 0


def test_converted_logits_are_those_of_the_papers(random_llama: Path, tmp_path: Path) -> None:
    convert(random_llama, tmp_path / "out", rope="yarn", factor=8)
    weights: dict[str, mx.array] = {}
    for file in random_llama.glob("model-*.safetensors"):
        weights |= mx.load(str(file))
    tokens = np.random.default_rng(0).integers(0, 2048, 300)  # the context was 128
    wavelengths = oracle.resonate(oracle.yarn_wavelengths(16, 10000, 8, 128))
    arrays = {name: np.array(value) for name, value in weights.items()}
    scale = oracle.yarn_attention_scale(8)
    expected = oracle.llama_logits(tokens, arrays, config_of(random_llama), wavelengths, scale)
    logits = np.array(load(tmp_path / "out")[0](mx.array(tokens)[None])[0])
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 sums


@pytest.mark.parametrize("rope", ["linear", "ntk", "dynamic", "yarn"])
def test_a_scaling_the_weights_were_trained_with_is_not_replaced(
    random_llama: Path, tmp_path: Path, copy_of: Any, rope: str
) -> None:
    source = copy_of(random_llama, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="trained with rope type linear"):
        convert(source, tmp_path / "out", rope=rope, factor=8)
    assert convert(source, tmp_path / "out").rope.rope_type == "resonance_linear"


def test_no_resonance_keeps_the_angles(random_llama: Path, tmp_path: Path) -> None:
    done = convert(random_llama, tmp_path / "out", resonance=False)
    assert RopeConfig.from_hf(config_of(tmp_path / "out")) == RopeConfig.from_hf(config_of(random_llama)) == done.rope
    assert done.largest_shift == 0


@pytest.mark.parametrize("rope", ["linear", "ntk", "dynamic", "yarn"])
def test_every_new_scaling_loads_and_reaches_the_longer_context(random_llama: Path, tmp_path: Path, rope: str) -> None:
    done = convert(random_llama, tmp_path / "out", rope=rope, factor=4)
    assert done.rope.context_length == 512
    model, _ = load(tmp_path / "out")
    assert model.args.rope == done.rope
    assert mx.all(mx.isfinite(model(mx.arange(500)[None]))).item()


def test_a_config_of_transformers_5_loses_no_rope_key(random_llama: Path, tmp_path: Path, copy_of: Any) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.9,
        "truncate": False,
    }
    source = copy_of(random_llama, rope_parameters=parameters, max_position_embeddings=512)
    convert(source, tmp_path / "out", resonance=False)
    written = config_of(tmp_path / "out")
    assert "rope_parameters" not in written
    assert written["rope_scaling"] | {"rope_theta": written["rope_theta"]} == parameters


def test_null_keys_stay_null(random_llama: Path, tmp_path: Path, copy_of: Any) -> None:
    source = copy_of(random_llama)
    config = config_of(source) | {"sliding_window": None}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", resonance=False)
    written = config_of(tmp_path / "out")
    assert written["sliding_window"] is None and "sliding_window" in written
    assert written.keys() - config.keys() <= {"rope_theta", "rope_scaling"}


def test_a_partial_rotary_factor_that_the_model_ignores_is_not_written(
    random_llama: Path, tmp_path: Path, copy_of: Any
) -> None:
    """With a scaling, transformers would rotate by it, and fail."""
    source = copy_of(random_llama, partial_rotary_factor=0.5)
    done = convert(source, tmp_path / "out", rope="yarn", factor=2, verify=True)
    assert "partial_rotary_factor" not in config_of(tmp_path / "out")
    assert load(tmp_path / "out")[0].args.rope.dims == 16
    assert done.checks is not None and done.checks["logits"]["error"] < 1e-4


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_models_of_mlx_lm_rotate_as_the_config_says(tmp_path: Path, model_type: str) -> None:
    """mlx-lm's own rotary module ignores `attention_factor`."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 0.7,
        },
    )
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    reference.save_pretrained(tmp_path / "source")
    tokens = np.random.default_rng(0).integers(0, 100, (1, 400))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    convert(tmp_path / "source", tmp_path / "out", resonance=False, tokenizer=False)
    logits = np.array(Checkpoint.open(tmp_path / "out").load()(mx.array(tokens)))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    convert(tmp_path / "source", tmp_path / "resonant", tokenizer=False)
    model = Checkpoint.open(tmp_path / "resonant").load()
    assert model.layers[1].self_attn.rope.frequencies.is_resonant
    assert np.abs(np.array(model(mx.array(tokens))) - expected).max() > 0.01 * np.abs(expected).max()


def test_a_broken_card_does_not_stop_a_conversion(random_llama: Path, tmp_path: Path, copy_of: Any) -> None:
    source = copy_of(random_llama)
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    convert(source, tmp_path / "out")
    assert "library_name: mlx" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_keeps_the_licence(random_llama: Path, tmp_path: Path) -> None:
    convert(random_llama, tmp_path / "out", rope="yarn", factor=8)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "mlx"
    assert "resonance_yarn" in card.text and "random-llama" in card.text
    assert str(random_llama.parent) not in card.content  # no path of the machine that converted


def flags(options: dict[str, Any]) -> list[str]:
    """Arguments of `convert` as a command line."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


LARGE = "9" * 400 + "GB"


@pytest.mark.parametrize(
    ("options", "named", "line"),
    [
        ({"rope": "yarm", "factor": 2}, "rope must be one of", "'--rope'"),
        ({"rope": "llama3", "factor": 2}, "rope must be one of", "'--rope'"),
        ({"rope": "yarn"}, "the scaling yarn needs a factor: try factor=…", "needs a factor: give --factor"),
        ({"rope": "yarn", "factor": 0.5}, "factor must be", "'--factor'"),
        ({"rope": "yarn", "factor": float("nan")}, "factor must be", "'--factor'"),
        ({"factor": 2.0}, "factor = 2.0 needs the name of a scaling: try rope=…", "scaling: give --rope"),
        (
            {"rope": "yarn", "factor": 2, "original_max_position_embeddings": 0},
            "original_max_position_embeddings must be positive, got 0",
            "'--original-max-position-embeddings'",
        ),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'", "'--dtype'"),
        ({"q_bits": 4}, "q_bits = 4 is a setting of quantization: try quantize=True", "give --quantize"),
        ({"q_bits": 0}, "try quantize=True", "'--q-bits'"),
        ({"q_mode": "mxfp8"}, "try quantize=True", "q_mode = mxfp8 is a setting of quantization: give --quantize"),
        ({"quantize": True, "q_bits": 7}, "q_bits must be one of 2, 3, 4, 5, 6, 8, got 7", "got 7 (--q-bits)"),
        ({"quantize": True, "q_group_size": 5}, "q_group_size must be one of 32, 64, 128", "'--q-group-size'"),
        ({"quantize": True, "q_group_size": 33}, "q_group_size must be", "got 33 (--q-group-size)"),
        ({"quantize": True, "q_mode": "int4"}, "q_mode must be one of affine", "'--q-mode'"),
        ({"quantize": True, "q_mode": "mxfp4", "q_bits": 4}, "q_mode mxfp4 has its own", "leave it out (--q-bits)"),
        ({"quantize": True, "quant_predicate": "mixed_9_9"}, "quant_predicate must be one of", "'--quant-predicate'"),
        ({"max_shard_size": LARGE}, "max_shard_size must be a size", "'--max-shard-size'"),
        ({"max_shard_size": "5"}, "max_shard_size must be a size", "such as 500MB or 5GB, got '5'"),
        ({"max_shard_size": "-1GB"}, "max_shard_size must be a size", "'--max-shard-size'"),
        ({"verify": True, "consume_source": True}, "reads the source again", "meanwhile (--consume-source)"),
    ],
)
def test_wrong_arguments_are_named(
    run: Any, random_llama: Path, tmp_path: Path, options: dict[str, Any], named: str, line: str
) -> None:
    """In Python as the parameter, by the command as its flag."""
    with pytest.raises(UsageError) as refused:
        convert(random_llama, tmp_path / "out", **options)
    assert named in str(refused.value) and "--" not in str(refused.value)
    code, stdout, stderr = run("convert", random_llama, "--mlx-path", tmp_path / "out", *flags(options))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and line in stderr, stderr
    assert list(tmp_path.iterdir()) == []


def test_a_size_of_files_may_be_a_number(random_llama: Path, tmp_path: Path) -> None:
    number, text = (convert(random_llama, tmp_path / "out", max_shard_size=s, dry_run=True) for s in (600_000, "0.6MB"))
    assert number.sizes == text.sizes and number.files > 1
    with pytest.raises(UsageError, match="max_shard_size must be positive, got 0"):
        convert(random_llama, tmp_path / "out", max_shard_size=0)


def test_the_commands_choices_are_the_librarys() -> None:
    """The command repeats them, so that `--help` need not import mlx-lm."""
    parameters = get_type_hints(convert_command.command)
    choices = {name: get_args(parameters[name]) for name in ("rope", "dtype", "q_mode", "quant_predicate")}
    choices = {name: get_args(types[0]) or types for name, types in choices.items()}
    assert choices == {"rope": SCALINGS, "dtype": DTYPES, "q_mode": MODES, "quant_predicate": tuple(QUANT_RECIPES)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "not-a-model"}, "not-a-model"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"rope_type": "spiral"}, "rope_parameters": None}, "spiral"),
        ({"hidden_size": 72}, "shape"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ({"quantization": "4bit"}, "quantization must be an object"),
        ({"quantization_config": [1]}, "quantized"),
        ({"model_type": "mixtral"}, "llama, mistral, qwen2, qwen3"),
    ],
)
def test_wrong_configs_are_named(
    random_llama: Path, tmp_path: Path, copy_of: Any, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        convert(copy_of(random_llama, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
