"""GGUF files for tests, written with the gguf package from models of transformers, in llama.cpp's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

TOKENS = 320  # in the vocabulary of the models here
MAKERS = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
OF_QWEN3 = {"head_dim": 128}  # of a Qwen 3, transformers' reader of GGUF knows no other one
SIZES = {
    "vocab_size": TOKENS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
Tensors = dict[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType]]


def random_model(architecture: str, **changes: Any) -> Any:
    """A random model of transformers with biases and norms that matter."""
    import torch
    import transformers

    torch.manual_seed(0)
    name = MAKERS[architecture]
    config = getattr(transformers, f"{name}Config")(**SIZES | (OF_QWEN3 if architecture == "qwen3" else {}) | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(torch.rand_like(value) + (0.5 if "norm" in key else -0.5))
    return model


def fields(architecture: str, model: Any, **changes: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes: keys without the architecture. None removes one."""
    config = model.config
    values = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": 10000.0,
        "rope.dimension_count": config.head_dim if architecture == "llama" else None,
        "attention.key_length": getattr(config, "head_dim", None) if architecture == "qwen3" else None,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def tensors(architecture: str, model: Any, kind: GGMLQuantizationType) -> Tensors:
    """A model's tensors by llama.cpp's names; matrices have the given type, the rest is float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found: Tensors = {}
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key, tensor in state.items():
        value = tensor.numpy()
        if architecture == "llama" and (part := key.split(".")[-2]) in heads:
            pairs = value.reshape(heads[part], 2, value.shape[0] // heads[part] // 2, *value.shape[1:])
            value = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)
        own = kind if value.ndim == 2 else GGMLQuantizationType.F32
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        found[name] = (quants.quantize(value, own), own)
    return found


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random blocks of a type, with values that a model survives: the gguf package cannot quantize to all of them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    small = np.frombuffer(np.float16(2.0**-12).tobytes(), np.uint8)
    for at in SCALES[kind]:
        rows[..., at : at + 2] = small
    if kind == KINDS.IQ1_M:  # the four bits above each of four words
        rows[..., -7::2] &= 0x0F
        rows[..., -1] |= 0x10
    elif kind == KINDS.MXFP4:  # a power of two
        rows[..., 0] = 115
    elif kind == KINDS.NVFP4:  # 8-bit floats
        rows[..., :4] = 0x10
    return rows.reshape(*shape[:-1], -1)


# Where the half-precision scales of a block begin.
KINDS = GGMLQuantizationType
SCALES = {
    KINDS.Q5_0: [0], KINDS.Q5_1: [0, 2], KINDS.Q2_K: [80, 82], KINDS.Q3_K: [108], KINDS.Q4_K: [0, 2],
    KINDS.Q5_K: [0, 2], KINDS.Q6_K: [208], KINDS.IQ2_XXS: [0], KINDS.IQ2_XS: [0], KINDS.IQ2_S: [0],
    KINDS.IQ3_XXS: [0], KINDS.IQ3_S: [0], KINDS.IQ1_S: [0], KINDS.IQ1_M: [], KINDS.IQ4_NL: [0], KINDS.IQ4_XS: [0],
    KINDS.TQ1_0: [52], KINDS.TQ2_0: [64], KINDS.MXFP4: [], KINDS.NVFP4: [],
}  # fmt: skip


def write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    content: Tensors,
    whole: Mapping[str, Any] | None = None,
    change: Callable[[GGUFWriter], None] | None = None,
    each: int = 0,
) -> Path:
    """Write a file.

    Args:
        path: of it.
        architecture: of the model.
        keys: metadata without the architecture's prefix.
        content: the tensors.
        whole: metadata by whole keys; of some, such as general.type, in place of what is usual.
        change: called with the writer at the end.
        each: number of tensors in each part of a split file; 0 for one file.

    Returns:
        The path, of a split file that of the first part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture, split_max_tensors=each)
    for key, value in {**{f"{architecture}.{key}": value for key, value in keys.items()}, **(whole or {})}.items():
        add(writer, key, value)
    for name, (value, kind) in content.items():
        writer.add_tensor(name, value, raw_dtype=kind)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf")) if each else [path]
    return parts[0]


def tokenizer() -> dict[str, Any]:
    """Metadata of a tokenizer with a token for each byte and none for words; `bytes_to_unicode` gives their letters."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["Ġ a"],
        "tokenizer.ggml.tokens": [*letters, "Ġa", *(f"<|{i}|>" for i in range(TOKENS - 257))],
        "tokenizer.ggml.token_type": [1] * 257 + [3] * (TOKENS - 257), "tokenizer.ggml.bos_token_id": 300,
        "tokenizer.ggml.eos_token_id": 301, "tokenizer.chat_template": "{{ messages[0].content }}",
    }  # fmt: skip


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add metadata of the type that llama.cpp gives to such a value."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif 0 <= value < 2**32:
        writer.add_uint32(key, value)
    else:
        writer.add_uint64(key, value) if value > 0 else writer.add_int64(key, value)


def model_file(
    path: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = KINDS.F32,
    whole: Mapping[str, Any] | None = None,
    each: int = 0,
    **changes: Any,
) -> Path:
    """A file of a random model with a tokenizer, with changes to its metadata as `fields` takes them."""
    model = random_model(architecture)
    keys, content = fields(architecture, model, **changes), tensors(architecture, model, kind)
    return write(path, architecture, keys, content, tokenizer() if whole is None else whole, each=each)
