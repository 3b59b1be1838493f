"""LLaMA-family models far past the context they were trained on: Resonance-YaRN for MLX."""

from . import blas

blas.load()  # before anything imports mlx.core

from .config import RopeConfig  # noqa: E402
from .frequencies import (  # noqa: E402
    RotaryFrequencies,
    default_frequencies,
    dynamic_ntk_frequencies,
    feature_gap,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)
from .loading import install, load  # noqa: E402
from .rope import ResonanceRoPE  # noqa: E402

__version__ = "0.1.0"
