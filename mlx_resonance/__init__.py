"""Run LLaMA-family models far past the context they were trained on: Resonance-YaRN for MLX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import blas

blas.load_blas()  # before anything imports mlx.core
blas.keep_freed_memory()

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
from .release import VERSION  # noqa: E402
from .rope_config import RopeConfig  # noqa: E402

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, load
    from .generation import generate, plan_memory, stream_generate
    from .mlx_lm_models import install
    from .rope import ResonanceRoPE

__version__ = VERSION
__all__ = [
    "Checkpoint",
    "ResonanceRoPE",
    "RopeConfig",
    "RotaryFrequencies",
    "default_frequencies",
    "dynamic_ntk_frequencies",
    "feature_gap",
    "generate",
    "install",
    "linear_frequencies",
    "llama3_frequencies",
    "load",
    "longrope_frequencies",
    "ntk_frequencies",
    "plan_memory",
    "stream_generate",
    "yarn_frequencies",
]

# These import MLX, and all but the first mlx-lm and transformers, which takes three seconds: a shell that completes a
# command, and `--help`, need neither.
_LATER = {
    "ResonanceRoPE": "rope",
    "Checkpoint": "checkpoint",
    "load": "checkpoint",
    "install": "mlx_lm_models",
    "generate": "generation",
    "plan_memory": "generation",
    "stream_generate": "generation",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
