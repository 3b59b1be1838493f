"""Text generation on mlx-lm's caches and samplers, with a memory plan, chunked prefill and an on-disk KV cache."""

from .memory import MemoryPlan, plan_memory, require_memory
from .prompt_cache import PromptCache, cache_key
from .stream import check_length, figures, generate, prompt_tokens, stream_generate

__all__ = [
    "MemoryPlan",
    "PromptCache",
    "cache_key",
    "check_length",
    "figures",
    "generate",
    "plan_memory",
    "prompt_tokens",
    "require_memory",
    "stream_generate",
]
