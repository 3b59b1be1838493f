"""Checkpoints whose headers alone can be read: their weights take no disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def sparse(
    folder: Path, hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    bits: int = 16, tied: bool = True,
) -> Path:  # fmt: skip
    """A LLaMA in float16, or quantized to fewer bits, with 2**20 tokens of context."""
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2**20, "tie_word_embeddings": tied,
    }  # fmt: skip
    if bits < 16:
        config["quantization"] = {"group_size": 64, "bits": bits}
    keys = hidden * kv_heads // heads
    shapes = {"model.embed_tokens": [vocabulary, hidden], "model.norm": [hidden]}
    shapes |= {} if tied else {"lm_head": [vocabulary, hidden]}
    for i in range(layers):
        of_a_layer = {
            "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden], "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [feed_forward, hidden], "mlp.up_proj": [feed_forward, hidden],
            "mlp.down_proj": [hidden, feed_forward],
            "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_a_layer.items()}
    header: dict[str, Any] = {}
    place = 0
    for name, shape in shapes.items():
        parts = {"weight": ("F16", shape)}
        if bits < 16 and len(shape) == 2:
            rows, columns = shape
            parts = {"weight": ("U32", [rows, columns * bits // 32])}
            parts |= {part: ("F16", [rows, columns // 64]) for part in ("scales", "biases")}
        for part, (dtype, sizes) in parts.items():
            end = place + (4 if dtype == "U32" else 2) * math.prod(sizes)
            header[f"{name}.{part}"] = {"dtype": dtype, "shape": sizes, "data_offsets": [place, end]}
            place = end
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + place)
    return folder
