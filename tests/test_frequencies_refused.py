"""Arguments that the makers of frequencies refuse, with the key in the message."""

from __future__ import annotations

import math

from mlx_resonance import (
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)
from mlx_resonance.errors import UsageError

import numpy as np
import pytest

from .scalings import LLAMA3, LONGROPE, YARN

NAN, INF = math.nan, math.inf
REFUSED = [
    ("dims", default_frequencies, {"dims": 7}),
    ("dims", default_frequencies, {"dims": 0}),
    ("dims", default_frequencies, {"dims": -2}),
    ("dims", ntk_frequencies, {"dims": 2, "base": 1e4, "factor": 2}),
    ("dims", dynamic_ntk_frequencies, {"dims": 2, "base": 1e4, "factor": 2, "max_position_embeddings": 64}),
    *(("rope_theta", default_frequencies, {"dims": 8, "base": base}) for base in (1, 0, -10.0, NAN, INF)),
    *(("factor", linear_frequencies, {"dims": 8, "base": 1e4, "factor": factor}) for factor in (0.5, 0, -2, NAN, INF)),
    ("factor", ntk_frequencies, {"dims": 8, "base": 1e4, "factor": 0.9}),
    ("factor", dynamic_ntk_frequencies, {"dims": 8, "base": 1e4, "factor": 0.9, "max_position_embeddings": 64}),
    (
        "max_position_embeddings",
        dynamic_ntk_frequencies,
        {"dims": 8, "base": 1e4, "factor": 2, "max_position_embeddings": 1},
    ),
    *(
        (key, yarn_frequencies, {"dims": 64, "base": 1e4} | YARN | change)
        for key, change in [
            ("factor", {"factor": 0.5}),
            ("original_max_position_embeddings", {"original_max_position_embeddings": 0}),
            ("beta_fast", {"beta_fast": 0.5}),
            ("beta_slow", {"beta_slow": 0}),
            ("beta_fast", {"beta_fast": NAN}),
            ("extrapolation_factor", {"extrapolation_factor": 1.5}),
            ("extrapolation_factor", {"extrapolation_factor": NAN}),
            ("attention_factor", {"attention_factor": 0}),
            ("attention_factor", {"attention_factor": -1.0}),
            ("attention_factor", {"attention_factor": NAN}),
            ("dims", {"dims": 63}),
            ("rope_theta", {"base": 1}),
        ]
    ),
    *(
        (key, llama3_frequencies, {"dims": 64, "base": 1e4} | LLAMA3 | change)
        for key, change in [
            ("factor", {"factor": 0.5}),
            ("high_freq_factor", {"high_freq_factor": 1.0}),
            ("low_freq_factor", {"low_freq_factor": 0}),
            ("low_freq_factor", {"low_freq_factor": NAN}),
            ("original_max_position_embeddings", {"original_max_position_embeddings": 1}),
        ]
    ),
    *(
        (key, longrope_frequencies, {"dims": 64, "base": 1e4} | LONGROPE | change)
        for key, change in [
            ("short_factor", {"short_factor": [1.0] * 31}),
            ("long_factor", {"long_factor": [1.0] * 33}),
            ("short_factor", {"short_factor": [1.0] * 31 + [0.0]}),
            ("long_factor", {"long_factor": [1.0] * 31 + [NAN]}),
            ("attention_factor", {"attention_factor": 0.0}),
            ("original_max_position_embeddings", {"original_max_position_embeddings": 1}),
        ]
    ),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.array([6.0, 0.0])}),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.array([6.0, NAN])}),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.array([])}),
    ("wavelengths", RotaryFrequencies, {"wavelengths": np.ones((2, 2))}),
    ("attention_scale", RotaryFrequencies, {"wavelengths": np.array([6.0]), "attention_scale": INF}),
    ("wavelength", RotaryFrequencies(np.array([0.3])).resonate, {}),
]


@pytest.mark.parametrize("key, maker, arguments", REFUSED)
def test_refused_with_the_key_in_the_message(key, maker, arguments):
    with pytest.raises(UsageError, match=rf"^\[\w+\] .*\b{key}\b"):
        maker(**arguments)
