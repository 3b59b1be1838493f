"""Text generation on mlx-lm's caches and samplers: planned, read in chunks, kept for the next prompt."""

from .memory import MemoryPlan, plan_memory
from .prompt_cache import PromptCache, cache_key
from .stream import check_context, figures, generate, prompt_tokens, stream_generate

__all__ = [
    "MemoryPlan",
    "PromptCache",
    "cache_key",
    "check_context",
    "figures",
    "generate",
    "plan_memory",
    "prompt_tokens",
    "stream_generate",
]
