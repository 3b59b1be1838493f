"""What lets fine-tuning fit a Mac: the base in its own type or quantized, logits in chunks, a plan that knows it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_resonance import Checkpoint, load
from mlx_resonance.convert import convert
from mlx_resonance.errors import UsageError
from mlx_resonance.finetuning import base, chunks
from mlx_resonance.finetuning.memory import plan_training, require_training_memory
from mlx_resonance.finetuning.recipes import PRESETS, Recipe, choose
from mlx_resonance.finetuning.result import _fused
from mlx_resonance.finetuning.run import loss_scale
from mlx_resonance.training import _loss_and_grad, train

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .checkpoints import FITTED_HERE, STDLIB_LLAMA, in_float32, random_checkpoint, source, weights

GB = 10**9
LLAMAS = {  # hidden, feed-forward, layers, heads, key heads, vocabulary, context
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32_000, 4096),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128_256, 8192),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32_000, 4096),
}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Checkpoints in float16 whose headers alone are read: their weights take no disk."""
    folder = tmp_path_factory.mktemp("llamas")
    return {name: Checkpoint.open(sparse(folder / name, *shape)) for name, shape in LLAMAS.items()}


def sparse(
    folder: Path, hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int
) -> Path:
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": context, "tie_word_embeddings": False,
    }  # fmt: skip
    keys = hidden * kv_heads // heads
    of_a_layer = {
        "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [keys, hidden], "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [feed_forward, hidden],
        "mlp.up_proj": [feed_forward, hidden], "mlp.down_proj": [hidden, feed_forward],
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
    }  # fmt: skip
    shapes = {"model.embed_tokens": [vocabulary, hidden], "model.norm": [hidden], "lm_head": [vocabulary, hidden]}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in of_a_layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(source()[:6000])
    return path


def tokens(shape: tuple[int, int], vocabulary: int = 2048) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, vocabulary, size=shape))


def adapted(model: Path, recipe: Recipe) -> nn.Module:
    """A model with adapters that change it."""
    made = Checkpoint.open(model).load(lazy=True)
    base.prepare(made, recipe)
    outputs = {name: value for name, value in tree_flatten(made.trainable_parameters()) if name.endswith("lora_b")}
    drawn = {name: mx.random.normal(value.shape, scale=0.003, key=mx.random.key(1)) for name, value in outputs.items()}
    made.load_weights(list(drawn.items()), strict=False)
    return made


@pytest.mark.parametrize("name", ["Llama-2-7B", "Llama-3-8B"])
def test_a_7b_fits_a_mac(llamas: dict[str, Checkpoint], name: str) -> None:
    plan = plan_training(llamas[name], Recipe(4096, fine_tune_type="lora", q_bits=4), 16 * GB)
    assert plan.total < 12 * GB and plan.fits
    # 4 bits, and 16 of scale and 16 of bias for 64 of them
    numbers = sum(math.prod(info.shape) for info in llamas[name].tensors.values())
    assert plan.weights == pytest.approx(numbers * 4.5 / 8, rel=0.03)
    in_16_bits = plan_training(llamas[name], Recipe(4096, fine_tune_type="lora"), 16 * GB)
    assert in_16_bits.weights == pytest.approx(numbers * 2, rel=0.01) and not in_16_bits.fits


def test_advice_fits(llamas: dict[str, Checkpoint]) -> None:
    """Whatever the recipe, the model and the budget: what is advised passes the check, if anything does."""
    draw, advised = random.Random(0), 0
    for _ in range(150):
        checkpoint = llamas[draw.choice(list(llamas))]
        preset = draw.choice([None, *PRESETS])
        changes: dict[str, Any] = {
            "fine_tune_type": draw.choice(["full", "lora"]), "grad_checkpoint": draw.choice([None, False]),
            "batch_size": draw.choice([None, 4]), "num_layers": draw.choice([None, None, 8]),
            "length": draw.choice([None, 512, 4096]),
        }  # fmt: skip
        memory = int(draw.choice([8, 16, 24, 36, 64, 128, 192]) * GB)
        rope, recipe = choose(checkpoint.rope, preset, **changes)
        try:
            require_training_memory(checkpoint.with_rope(rope), recipe, memory)
        except UsageError as error:
            least = Recipe(64, fine_tune_type="lora", q_bits=4, num_layers=recipe.num_layers)
            if len(error.remedies) == 1:
                assert "only a smaller model would fit" in error.message
                assert not plan_training(checkpoint, least, memory).fits
                continue
            change, advised = error.remedies[0], advised + 1
            rope, better = choose(checkpoint.rope, preset, **changes | change)
            assert better == replace(recipe, **change)
            require_training_memory(checkpoint.with_rope(rope), better, memory)
            assert better.batch_size * better.accumulate == recipe.batch_size * recipe.accumulate
    assert advised > 50


def test_the_papers_presets_lead_to_what_fits(llamas: dict[str, Checkpoint], run: Any, tmp_path: Path) -> None:
    folder = llamas["Llama-2-7B"].folder
    command = ("finetune", "-m", folder, "--data", tmp_path, "--mlx-path", tmp_path / "out", "--preset", "paper-7b")
    for memory, advice in (
        ("128GB", "give --fine-tune-type lora or --force"),
        ("48GB", "give --fine-tune-type lora --q-bits 4 or --force"),
        ("16GB", "give --fine-tune-type lora --q-bits 4 --length 4096 --skip-positions or --force"),
        ("2GB", "the limit is 0.0 MB: only a smaller model would fit: give --force"),
    ):
        code, _, stderr = run(*command, "--memory", memory)
        assert code == 2 and stderr.count("\n") == 1 and advice in stderr, stderr


@pytest.mark.parametrize("vocabulary", [2048, 49_152, 128_256, 20_000_000])
def test_logits_at_once(vocabulary: int) -> None:
    size = chunks.tokens_at_once(vocabulary)
    assert size >= 1 and (size == 1 or size * vocabulary * 4 * chunks.COPIES <= 64_000_000)
    assert size > 1 or vocabulary > 10**6


@pytest.mark.parametrize("dtype", [mx.float32, pytest.param(mx.bfloat16, marks=pytest.mark.long)])
def test_logits_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype) -> None:
    """The shapes that are built, and the peak: 64 MB, however many tokens there are."""
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "vocab_size": 128_256, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Checkpoint.of("llama", Path(), config, {}).build()
    model.set_dtype(dtype)
    model.freeze()
    model.layers[0].mlp.unfreeze()
    shapes, original = [], chunks.attention.next_token_logits

    def counted(model: nn.Module, states: mx.array) -> mx.array:
        logits = original(model, states)
        shapes.append(logits.shape)
        return logits

    monkeypatch.setattr(chunks.attention, "next_token_logits", counted)
    size = chunks.tokens_at_once(128_256)
    batch = tokens((1, 16 * size + 3), 128_256)
    mx.eval(model.parameters(), batch)
    step = mx.compile(lambda batch: nn.value_and_grad(model, chunks.next_token_loss)(model, batch))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loss, gradients = step(batch)
    mx.eval(loss, gradients)
    assert {shape[0] for shape in shapes} == {size, 2} and {shape[1] for shape in shapes} == {128_256}
    assert not FITTED_HERE or mx.get_peak_memory() - before < 65_000_000
    assert loss.item() == pytest.approx(math.log(128_256), rel=0.1)


def test_weights_are_quantized_as_convert_does(tmp_path: Path) -> None:
    """Bit by bit, and never with the whole model in memory as it was."""
    folder = random_checkpoint(tmp_path / "model", 256, 704, 12, 4, 2, 2048, mx.float32)
    for mode in ("affine", "mxfp4"):
        out = convert(folder, tmp_path / mode, quantize=True, q_mode=mode, resonance=False).path
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model = Checkpoint.open(folder).load(lazy=True)
        base.quantize(model, Recipe(64, fine_tune_type="lora", q_mode=mode).quantization or {})
        mx.eval(model.parameters())
        size = mx.get_active_memory() - before
        if mode == "affine":
            assert mx.get_peak_memory() - before < size + 2 * 4 * 2048 * 256  # the largest is the embedding
        wanted = weights(out)
        found = {name: value for name, value in tree_flatten(model.parameters()) if value is not None}
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype and mx.array_equal(value, wanted[name]), name


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_fused_result_is_what_was_trained(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    """In float32 to the rounding of sums; in 16 bits, each weight is rounded once."""
    model = adapted(checkpoint, Recipe(64, fine_tune_type="lora", q_mode=mode))
    model.eval()
    batch = tokens((1, 48))
    wanted, plain = model(batch), _plain_logits(checkpoint, mode, batch)
    largest = mx.max(mx.abs(wanted)).item()
    assert mx.max(mx.abs(wanted - plain)).item() > 0.02 * largest  # the adapters change something
    for dtype, bound in ((mx.float32, 1e-5), (mx.float16, 2e-3), (mx.bfloat16, 2e-2)):
        fused = Checkpoint.open(checkpoint).load()
        fused.load_weights(list(_fused(model, dtype).items()))  # strict: the same names and shapes
        fused.set_dtype(mx.float32)
        assert mx.max(mx.abs(fused(batch) - wanted)).item() <= bound * largest, dtype


def _plain_logits(folder: Path, mode: str, batch: mx.array) -> mx.array:
    model = Checkpoint.open(folder).load()
    quantized, _ = mlx_lm.utils.quantize_model(model, {}, None, None, mode=mode)
    return quantized(batch)


def gradients_of(model: nn.Module, recipe: Recipe, batch: mx.array, scale: float) -> np.ndarray:
    loss_and_grad = _loss_and_grad(model, chunks.next_token_loss, scale)
    weights = mx.full(batch.shape, batch.size / recipe.length)  # the rest of a long sequence is not there
    with chunks.activation_checkpointing(model, recipe.grad_checkpoint):
        value, gradients = loss_and_grad(model, batch, weights)
    assert mx.isfinite(value).item()
    return np.concatenate([np.array(value, np.float64).ravel() for _, value in tree_flatten(gradients)])


def test_gradients_of_a_float16_base(tmp_path: Path) -> None:
    """Finite, in float32, and those of the same weights in float32; without the scale they lose their small values."""
    recipe, batch = Recipe(32768, fine_tune_type="lora", num_layers=3), tokens((1, 128))
    half = adapted(STDLIB_LLAMA, recipe)
    assert half.model.norm.weight.dtype == mx.float16 and half.layers[-1].mlp.up_proj.lora_a.dtype == mx.float32
    assert half.layers[-1].mlp.up_proj.linear.weight.dtype == mx.float16
    whole = adapted(in_float32(STDLIB_LLAMA, tmp_path / "float32"), recipe)
    wanted = gradients_of(whole, recipe, batch, 1.0)
    scale = loss_scale(half, recipe)
    assert (scale, loss_scale(whole, recipe)) == (32768.0, 1.0)
    found, unscaled = (gradients_of(half, recipe, batch, value) for value in (scale, 1.0))
    errors = [np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted) for gradient in (found, unscaled)]
    assert np.isfinite(found).all() and errors[0] < 0.01 and errors[1] > 0.05


def test_a_gradient_that_overflows_stops_the_run(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)

    def loss(model: nn.Module, x: mx.array) -> mx.array:
        return mx.sum(model(x).astype(mx.float16).astype(mx.float32))

    path = tmp_path / "checkpoint.safetensors"
    options: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 1, "loss_scale": 2.0**17}
    with pytest.raises(FloatingPointError, match="step 1"):
        train(model, optim.SGD(0.1), loss, lambda _: (mx.ones((1, 2)),), 1, **options)
    assert not path.exists()


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (512, {}),
        (512, {"grad_checkpoint": False}),
        (1024, {"num_layers": 2}),
        pytest.param(2048, {}, marks=pytest.mark.long),
        (128, {"q_bits": 4}),
    ],
    ids=["lora", "kept", "two layers", "long", "4 bits"],
)
def test_the_plan_matches_the_memory_used(checkpoint: Path, length: int, changes: dict[str, Any]) -> None:
    recipe = Recipe(length, steps=1, accumulate=1, fine_tune_type="lora", **changes)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    opened = Checkpoint.open(checkpoint)
    model = opened.load(lazy=True)
    base.prepare(model, recipe)
    with chunks.activation_checkpointing(model, recipe.grad_checkpoint):
        train(model, optim.AdamW(1e-5), chunks.next_token_loss, lambda _: (tokens((1, length)),), 1)
    plan, found = plan_training(opened, recipe), mx.get_peak_memory() - before
    assert plan.weights < found  # both exact
    assert not FITTED_HERE or plan.total == pytest.approx(found, rel=0.2)


def test_qlora_in_one_command(run: Any, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """The result is an ordinary checkpoint; its adapters say what they were trained on; other bits are another run."""
    out = tmp_path / "out"
    options = ("-m", checkpoint, "--data", texts, "--length", 48, "--steps", 2, "--accumulate", 1, "--json")
    code, stdout, stderr = run("finetune", *options, "--mlx-path", out, "--q-bits", 4, "--learning-rate", 1e-3)
    assert code == 0, stderr
    recipe = json.loads(stdout)["settings"]["recipe"]
    assert (recipe["fine_tune_type"], recipe["q_bits"], recipe["grad_checkpoint"]) == ("lora", 4, True)
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in config and config["dtype"] == "float32"
    settings = json.loads((out / "adapters" / "adapter_config.json").read_text())
    assert settings["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    names = {name: value.shape for name, value in weights(checkpoint).items()}
    assert {name: value.shape for name, value in weights(out).items()} == names
    assert load(out)[0] is not None
    # The adapters on what `convert` makes of the source are what was trained.
    quantized = convert(checkpoint, tmp_path / "q", quantize=True, q_bits=4, resonance=False).path
    model = mlx_lm.utils.load_adapters(Checkpoint.open(quantized).load(), str(out / "adapters"))
    model.eval()
    batch = tokens((1, 32))
    wanted = model(batch)
    assert mx.max(mx.abs(load(out)[0](batch) - wanted)).item() <= 1e-5 * mx.max(mx.abs(wanted)).item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--q-bits", 7), "q_bits must be one of 2, 3, 4, 5, 6, 8, got 7 (--q-bits)"),
        (("--q-bits", 9), "'--q-bits': Input should be less than or equal to 8"),
        (("--q-bits", 4, "--q-group-size", 48), "q_group_size must be one of 32, 64, 128, got 48 (--q-group-size)"),
        (("--q-group-size", 32), "q_group_size = 32 is a setting of quantization: give --q-bits 4"),
        (("--q-mode", "mxfp4", "--q-bits", 4), "q_bits = 4: q_mode mxfp4 has its own, leave it out (--q-bits)"),
        (("--q-mode", "fp3"), "'fp3' is not one of 'affine', 'mxfp4', 'nvfp4', 'mxfp8'"),
        (
            ("--q-bits", 4, "--fine-tune-type", "full"),
            "q_bits = 4 quantizes the weights: only LoRA trains those: give --fine-tune-type lora",
        ),
    ],
)
def test_a_mistake_gets_one_line(
    run: Any, checkpoint: Path, texts: Path, tmp_path: Path, change: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "out"
    code, _, stderr = run("finetune", "-m", checkpoint, "--data", texts, "--mlx-path", out, "--length", 48, *change)
    assert code == 2 and stderr.count("\n") == 1 and message in stderr, stderr
    assert not any(tmp_path.iterdir())


def test_a_quantized_checkpoint_is_not_quantized_again(run: Any, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    quantized = convert(checkpoint, tmp_path / "q", quantize=True, q_bits=8, resonance=False).path
    command = ("finetune", "-m", quantized, "--data", texts, "--mlx-path", tmp_path / "out", "--length", 48)
    code, _, stderr = run(*command, "--q-bits", 4)
    line = stderr.splitlines()[-1]
    assert code == 2 and "already quantized (bits 8, group_size 64, mode affine): leave out q_bits (--q-bits)" in line


def test_no_layer_fits_the_group_size(run: Any, texts: Path, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", 96, 160, 2, 3, 3, 2048, mx.float32)
    command = ("finetune", "-m", folder, "--data", texts, "--mlx-path", tmp_path / "out", "--length", 48)
    code, _, stderr = run(*command, "--q-bits", 4)
    assert code == 2 and "no layer's width is a multiple of the group size 64 (--q-group-size)" in stderr


@pytest.mark.parametrize(("name", "wanted"), [("Llama-2-7B", (9.2, 18.9, 144.2)), ("Llama-3-8B", (10.1, 21.6, 177.2))])
def test_planned_peaks_in_the_docs(llamas: dict[str, Checkpoint], name: str, wanted: tuple[float, ...]) -> None:
    recipes = [Recipe(4096, fine_tune_type="lora", q_bits=4), Recipe(4096, fine_tune_type="lora"), Recipe(4096)]
    assert [round(plan_training(llamas[name], recipe).total / GB, 1) for recipe in recipes] == list(wanted)
