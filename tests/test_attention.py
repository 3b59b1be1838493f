"""The attention in mlx-lm's files: logits against the float64 oracle, caches, runtimes without its rope types."""

import json
import subprocess
import sys
from types import SimpleNamespace

from mlx_resonance import ResonanceRoPE, RopeConfig, attend
from mlx_resonance.attention import Inference, set_rope
from mlx_resonance.errors import UsageError

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.tuner.trainer import grad_checkpoint
from transformers import AutoModelForCausalLM

from . import oracle
from .pretend import pretend_gpu

FACTOR, ORIGINAL = 8, 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50,
    "max_position_embeddings": FACTOR * ORIGINAL,
    "tie_word_embeddings": False,
}
SCALING = {"rope_type": "resonance_yarn", "factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 32},
    "no GQA": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "base": {"rope_theta": 500000.0},
}
# Past the original context of 64 tokens; the relative error of float32 logits here is about 1e-6.
TOKENS = np.random.default_rng(1).integers(0, 50, (2, 100))
TOLERANCE = 1e-4


def with_random_weights(model):
    """Weights of a size that makes every part matter: sharp attention, norms and biases that are not 1 and 0."""
    mx.random.seed(0)

    def weight(shape):
        return mx.random.normal(shape) * 0.3 if len(shape) > 1 else 1 + mx.random.normal(shape) * 0.2

    model.update(tree_map(lambda old: weight(old.shape), model.parameters()))
    model.eval()
    return model


def random_model(file, config):
    """A model of mlx-lm's file that rotates as the configuration says."""
    plain = {"rope_theta": 10000.0} | config | {"rope_scaling": None}
    model = with_random_weights(file.Model(file.ModelArgs.from_dict(plain)))
    set_rope(model, RopeConfig.from_hf(config))
    return model


def random_llama(**changes):
    return random_model(llama, CONFIG | {"rope_scaling": SCALING} | changes)


def expected_logits(model, config, tokens, wavelengths, scale):
    weights = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    return oracle.llama_logits(tokens.tolist(), weights, config, wavelengths, scale)


def resonance_yarn(dims, base):
    return oracle.resonate(oracle.yarn_wavelengths(dims, base, FACTOR, ORIGINAL))


def relative_error(actual, expected):
    expected = np.array(expected)
    return np.abs(np.array(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_oracle(variant):
    config = CONFIG | VARIANTS[variant]
    model = random_llama(**VARIANTS[variant])
    wavelengths = resonance_yarn(config.get("head_dim", 12), config.get("rope_theta", 10000.0))
    expected = expected_logits(model, config, TOKENS[0], wavelengths, oracle.yarn_attention_scale(FACTOR))
    assert relative_error(model(mx.array(TOKENS))[0], expected) <= TOLERANCE


def test_the_oracle_notices_rounding():
    """The tolerance is far below what rounding the wavelengths changes."""
    model = random_llama()
    plain = oracle.yarn_wavelengths(12, 10000.0, FACTOR, ORIGINAL)
    unrounded = expected_logits(model, CONFIG, TOKENS[0], plain, oracle.yarn_attention_scale(FACTOR))
    assert relative_error(model(mx.array(TOKENS))[0], unrounded) > 100 * TOLERANCE


@pytest.mark.parametrize("chunks", [[100], [99, 1], [1, 99], [37, 40, 1, 1, 21]], ids=str)
def test_cached_chunks_equal_one_pass(chunks):
    model, tokens = random_llama(), mx.array(TOKENS)
    cache = model.make_cache()
    parts, start = [], 0
    for length in chunks:
        parts.append(model(tokens[:, start : start + length], cache=cache))
        start += length
    # The attention of a chunk is summed in a different order from that of the whole.
    assert relative_error(mx.concatenate(parts, axis=1), model(tokens)) <= TOLERANCE / 10


def test_batch_with_left_padding_equals_its_rows():
    model = random_llama()
    lengths = [20, 13, 7]
    padding = [max(lengths) - length for length in lengths]
    rows = [TOKENS[0, :length].tolist() for length in lengths]
    cache = [BatchKVCache(padding) for _ in model.layers]
    batch = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    prefilled = model(batch, cache=cache)
    step = model(mx.array([[5], [6], [7]]), cache=cache)
    for i, row in enumerate(rows):
        alone = model(mx.array([[*row, 5 + i]]))[0]
        assert relative_error(prefilled[i, padding[i] :], alone[:-1]) <= TOLERANCE / 10
        assert relative_error(step[i], alone[-1:]) <= TOLERANCE / 10


@pytest.mark.parametrize("cached", [False, True])
def test_angles_are_computed_once_for_all_layers(monkeypatch, cached):
    calls = []
    angles = ResonanceRoPE.angles

    def counted(self, length, offset, *options):
        calls.append((length, offset))
        return angles(self, length, offset, *options)

    monkeypatch.setattr(ResonanceRoPE, "angles", counted)
    model = random_llama(num_hidden_layers=3)
    cache = model.make_cache() if cached else None
    model(mx.array(TOKENS[:, :6]), cache=cache)
    model(mx.array(TOKENS[:, 6:10]), cache=cache)
    assert calls == [(6, 0), (4, 6 if cached else 0)]


def test_inference_gives_the_same_logits_and_the_model_stays_differentiable(monkeypatch):
    """Between two steps of a loop that generates, too: what MLX cannot differentiate ends with each step."""
    model, ids = random_llama(num_hidden_layers=2), mx.array(TOKENS[:, :10])

    def loss(embeddings):
        return mx.square(model(ids, input_embeddings=embeddings)).sum()

    embeddings = model.model.embed_tokens(ids)
    logits, gradient = model(ids), mx.grad(loss)(embeddings)
    launches, step = pretend_gpu(monkeypatch), Inference(model)
    assert mx.allclose(step(ids), logits, rtol=1e-5, atol=1e-5)
    assert launches == {"transformable": 0, "all": 2}
    assert mx.allclose(mx.grad(loss)(embeddings), gradient, rtol=1e-4, atol=1e-4)
    mapped = mx.vmap(lambda e: model(ids, input_embeddings=e))(mx.stack([embeddings, embeddings]))
    assert mx.allclose(mapped[1], logits, rtol=1e-5, atol=1e-5)
    assert launches["transformable"] >= 4
    with pytest.raises(UsageError):
        step(ids, cache=[SimpleNamespace(offset=-1)] * 2)
    assert mx.allclose(mx.grad(loss)(embeddings), gradient, rtol=1e-4, atol=1e-4)  # after an error as well
    assert step.args is model.args and step.layers is model.layers


def test_traditional_pairs_are_neighbours():
    """mlx-lm's `rope_traditional`: the same model once the rows of q and k are put in the other order."""
    model, traditional = random_llama(), random_llama(rope_traditional=True)
    order = np.arange(12).reshape(2, 6).T.ravel()
    for layer in traditional.layers:
        for projection, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, 2)):
            projection.weight = projection.weight.reshape(heads, 12, -1)[:, mx.array(order)].reshape(heads * 12, -1)
    assert relative_error(traditional(mx.array(TOKENS)), model(mx.array(TOKENS))) <= TOLERANCE / 10


def test_parameters_have_their_hugging_face_names():
    names = {name for name, _ in tree_flatten(random_llama(num_hidden_layers=1).parameters())}
    layer = "model.layers.0"
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        f"{layer}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight",
    }


def test_sliding_window_layers_see_only_the_window():
    kinds = ["full_attention", "sliding_attention"]
    narrow, wide = (random_llama(layer_types=kinds, sliding_window=window) for window in (8, 1000))
    tokens = mx.array(TOKENS[:, :30])
    assert relative_error(narrow(tokens)[:, :8], wide(tokens)[:, :8]) <= TOLERANCE / 10
    assert relative_error(narrow(tokens)[:, 8:], wide(tokens)[:, 8:]) > 100 * TOLERANCE
    assert relative_error(wide(tokens), random_llama()(tokens)) <= TOLERANCE / 10


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "resonance_dynamic", "factor": 2.0}]
)
def test_dynamic_follows_the_length_of_the_text(scaling):
    config = CONFIG | {"max_position_embeddings": 64, "rope_scaling": scaling}
    model = random_llama(max_position_embeddings=64, rope_scaling=scaling)
    for length in (40, 100, 40):
        frequencies = RopeConfig.from_hf(config).frequencies(length)
        expected = expected_logits(model, config, TOKENS[0, :length], frequencies.wavelengths, 1.0)
        assert relative_error(model(mx.array(TOKENS[:1, :length]))[0], expected) <= TOLERANCE


def test_gradient_checkpointing_of_mlx_lm(monkeypatch):
    block = llama.TransformerBlock
    monkeypatch.setattr(block, "__call__", block.__call__)  # grad_checkpoint replaces it
    model, tokens = random_llama(), mx.array(TOKENS[:, :10])

    def gradients():
        def loss(parameters):
            model.update(parameters)
            return mx.logsumexp(model(tokens), axis=-1).mean()

        return dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))

    plain = gradients()
    grad_checkpoint(model.layers[0])
    for name, gradient in gradients().items():
        assert relative_error(gradient, plain[name]) <= 1e-5, name


# --- other files of mlx-lm


def random_qwen2():
    return random_model(qwen2, CONFIG | {"model_type": "qwen2", "rope_scaling": SCALING})


def test_qwen_has_the_rotation():
    model = random_qwen2()
    for layer in model.layers:
        assert isinstance(layer.self_attn.rope, ResonanceRoPE)
    expected = expected_logits(
        model, CONFIG, TOKENS[0], resonance_yarn(12, 10000.0), oracle.yarn_attention_scale(FACTOR)
    )
    assert relative_error(model(mx.array(TOKENS))[0], expected) <= TOLERANCE


def test_qwen_works_with_its_caches():
    model, tokens = random_qwen2(), mx.array(TOKENS)
    cache = [KVCache() for _ in model.layers]
    parts = [model(tokens[:, :60], cache=cache), model(tokens[:, 60:], cache=cache)]
    assert relative_error(mx.concatenate(parts, axis=1), model(tokens)) <= TOLERANCE / 10


def test_stock_models_of_mlx_lm_work_as_before():
    """Ours and theirs side by side, of the same class."""
    plain = qwen2.ModelArgs.from_dict(CONFIG | {"model_type": "qwen2", "rope_theta": 10000.0})
    theirs = with_random_weights(qwen2.Model(plain))
    before = theirs(mx.array(TOKENS))
    random_qwen2()
    assert mx.array_equal(theirs(mx.array(TOKENS)), before)
    assert not any(isinstance(module, ResonanceRoPE) for module in theirs.modules())


@pytest.mark.parametrize("kv", [KVCache, BatchKVCache], ids=["single", "batch"])
@pytest.mark.parametrize("random", [random_llama, random_qwen2])
def test_no_launch_of_attention_exceeds_the_budget(monkeypatch, random, kv):
    """Whoever calls the model, a chunk of any size is read in launches of bounded size, with the same result."""
    launches = []
    original = attend.scaled_dot_product_attention

    def counted(queries, keys, values, **options):
        launches.append(queries.shape[0] * queries.shape[2] * keys.shape[2])
        return original(queries, keys, values, **options)

    monkeypatch.setattr(attend, "scaled_dot_product_attention", counted)
    model, tokens = random(), mx.array(TOKENS)

    def chunks():
        cache = [kv() if kv is KVCache else kv([3, 0]) for _ in model.layers]
        return mx.concatenate([model(part, cache=cache) for part in (tokens[:, :40], tokens[:, 40:])], axis=1)

    whole, unbounded = chunks(), max(launches)
    launches.clear()
    monkeypatch.setattr(attend, "BUDGET", 2 * 100 * 7)
    assert relative_error(chunks(), whole) <= TOLERANCE / 10
    assert max(launches) <= attend.BUDGET < unbounded


# --- runtimes that lack the rope type


def save(model, folder, rope_part):
    folder.mkdir()
    config = CONFIG | {"architectures": ["LlamaForCausalLM"]} | rope_part
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same weights with a resonance rope type in both styles of config.json, and without."""
    folder, model = tmp_path_factory.mktemp("checkpoints"), random_llama()
    rope = RopeConfig.from_hf(CONFIG | {"rope_scaling": SCALING})
    parts = {"4": rope.to_hf("4"), "5": rope.to_hf("5"), "plain": {}}
    return {name: save(model, folder / name, part) for name, part in parts.items()}


def test_stock_mlx_lm_refuses_the_checkpoint(checkpoints):
    code = """if True:
        import json, pathlib, sys, mlx_lm.utils
        results = []
        for folder in sys.argv[1:]:
            try:
                mlx_lm.utils.load_model(pathlib.Path(folder))
                results.append("loaded")
            except Exception as error:
                results.append(repr(error))
        print(json.dumps(results))
    """
    folders = [str(checkpoints[name]) for name in ("4", "5", "plain")]
    result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    refused = "ValueError('Unsupported RoPE type resonance_yarn')"
    assert json.loads(result.stdout) == [refused, refused, "loaded"]


@pytest.mark.parametrize("style", ["4", "5"])
def test_transformers_refuses_the_checkpoint(checkpoints, style):
    with pytest.raises(KeyError, match="resonance_yarn"):
        AutoModelForCausalLM.from_pretrained(checkpoints[style])
    AutoModelForCausalLM.from_pretrained(checkpoints["plain"])
