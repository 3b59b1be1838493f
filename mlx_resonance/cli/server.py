"""mlx-lm's server, hardened: requests that would end it, its generation thread or the connection get 4xx."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from ..errors import UsageError


class BadRequest(ValueError):
    """A request with a text that cannot be tokenized."""


class Refusal(BaseException):
    """Around a BadRequest, to pass mlx-lm's `except Exception`, which would answer 404."""


def harden_server() -> None:
    """Make mlx-lm's server refuse with 4xx what would end its generation thread, itself or the connection."""
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from mlx_lm import server

    handler, generator, provider = server.APIHandler, server.ResponseGenerator, server.ModelProvider
    post, complete, tokenize, generate, load = (
        handler.do_POST, handler.handle_completion, generator._tokenize, generator.generate, provider.load_default,
    )  # fmt: skip

    def do_POST(self: Any) -> None:
        try:
            post(self)
        except (Exception, Refusal) as error:
            if hasattr(self, "_headers_buffer"):  # the response has begun
                raise
            self._set_completion_headers(400)
            self.end_headers()
            self.wfile.write(json.dumps({"error": str(error)}).encode())

    def handle_completion(self: Any, request: Any, stop_words: Any) -> None:
        self.stream_options = {"include_usage": False} | (self.stream_options or {})
        chat = [(message.get("role"), message.get("content") or "") for message in request.messages]
        right = all(isinstance(role, str) and isinstance(content, (str, list)) for role, content in chat)
        if not right or not isinstance(request.prompt, str) or not (chat or request.request_type == "text"):
            raise ValueError("expected a string as prompt, or messages that have a role and content")
        if not isinstance(stop_words, list) or not all(isinstance(word, str) for word in stop_words):
            raise ValueError("stop must be a string or a list of strings")
        for key, value in self.body.items():
            limit = 2**64 if key == "seed" else 2**31
            if isinstance(value, (int, float)) and not (abs(value) < limit and (key != "seed" or value >= 0)):
                raise ValueError(f"{key} = {value} is out of range")
        complete(self, request, stop_words)

    def _tokenize(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        if args.sampling.top_k >= tokenizer.vocab_size:
            raise BadRequest(f"top_k must be less than the vocabulary size, {tokenizer.vocab_size}")
        if args.logits.logit_bias:
            known = set(tokenizer.get_vocab().values()) - set(getattr(tokenizer, "without_row", ()))
            if not set(args.logits.logit_bias) <= known:
                raise BadRequest("logit_bias has tokens that are not in the vocabulary")
        try:
            tokens, *rest = tokenize(self, tokenizer, request, args)
        except Exception as error:
            raise BadRequest(getattr(error, "message", error)) from None
        if not tokens:
            raise BadRequest("the prompt is empty")
        return tokens, *rest

    def respond(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return generate(self, *args, **options)
        except BadRequest as error:
            raise Refusal(error) from None

    def scan() -> Any:
        try:
            return scan_cache_dir()
        except CacheNotFound:  # nothing was ever downloaded: /v1/models still has a folder to name
            return SimpleNamespace(repos=())

    def load_default(self: Any) -> None:
        try:
            load(self)
        except Exception as error:  # in a thread: mlx-lm would keep running without answering
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            sys.stderr.flush()
            os._exit(2)

    def load_model(self: Any, *args: Any, **options: Any) -> Any:
        model, tokenizer = load_any(self, *args, **options)
        rope = getattr(getattr(model, "args", None), "rope", None)
        if rope is not None and rope.depends_on_length:
            why = f"the angles of {rope.rope_type} change with the length of a text"
            raise UsageError(f"{why}: a server, which answers several texts at once, cannot use them")
        return model, tokenizer

    load_any, provider.load = provider.load, load_model
    handler.do_POST, handler.handle_completion = do_POST, handle_completion
    generator._tokenize, generator.generate, provider.load_default = _tokenize, respond, load_default
    server.scan_cache_dir = scan
