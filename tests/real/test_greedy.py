"""Greedy answers: the tokens of transformers after short prompts, long ones, and those past the trained context."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_resonance import load, stream_generate

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .prompts import KEY, with_key

pytestmark = pytest.mark.real

TOKENS = 24
CLOSE = 0.005  # of log-probabilities: transformers' angles are in float32, and the largest logit is about 38


def of_transformers(folder: Path) -> Any:
    """transformers' model with the same weights; where ours is resonant, with its own wavelengths rounded."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_scaling", None) or {}
    if not rope:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert rope["rope_type"] == "resonance_yarn"
    rope |= {"rope_type": "yarn", "rope_theta": config.pop("rope_theta")}
    config = LlamaConfig(**config, rope_parameters=rope)
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    rotary = model.model.rotary_emb
    rotary.inv_freq = (2 * math.pi / (2 * math.pi / rotary.inv_freq.double()).round()).float()
    return model


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("smollm2", 100),
        ("smollm2_32k", 100),
        pytest.param("smollm2_32k", 2000, marks=pytest.mark.long),
        pytest.param("smollm2", 2000, marks=pytest.mark.long),
        pytest.param("smollm2_32k", 9000, marks=pytest.mark.long),  # it was trained on 8192
    ],
)
def test_the_pass_key_and_the_tokens_of_transformers(request: Any, name: str, length: int) -> None:
    folder = request.getfixturevalue(name)
    model, tokenizer = load(folder)
    prompt = with_key(tokenizer, length)
    ours = list(stream_generate(model, tokenizer, prompt, max_tokens=TOKENS))
    assert len(prompt) == length and KEY in "".join(response.text for response in ours)
    answer = of_transformers(folder).generate(
        torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for response, token, logits in zip(ours, answer.sequences[0, length:].tolist(), answer.logits, strict=True):
        theirs = torch.log_softmax(logits[0], -1).numpy()
        assert np.abs(np.array(response.logprobs) - theirs).max() <= CLOSE
        if response.token != token:  # a tie, and what follows depends on it
            assert theirs[token] - theirs[response.token] <= 2 * CLOSE
            break
