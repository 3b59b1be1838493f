"""Text generation on mlx-lm's caches and samplers, with a memory plan, chunked prefill and an on-disk KV cache."""

from .engine import Engine
from .memory import MemoryPlan, plan_memory, require_memory
from .messages import prompt_tokens
from .prompt_cache import PromptCache, cache_key
from .sampling import Sampling
from .stream import check_length, figures, generate, stream_generate

__all__ = [
    "Engine",
    "MemoryPlan",
    "PromptCache",
    "Sampling",
    "cache_key",
    "check_length",
    "figures",
    "generate",
    "plan_memory",
    "prompt_tokens",
    "require_memory",
    "stream_generate",
]
