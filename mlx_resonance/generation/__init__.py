"""Text generation on mlx-lm's caches and samplers."""

from .stream import figures, generate, prompt_tokens, stream_generate

__all__ = ["figures", "generate", "prompt_tokens", "stream_generate"]
