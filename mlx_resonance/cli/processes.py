"""Several processes: each one that mlx.launch starts holds a part of every layer's matrices and heads."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache, wraps
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec
from zlib import crc32

from ..errors import UsageError

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..checkpoint import Checkpoint
    from ..generation import PromptCache
    from ..generation.batch import Request

P = ParamSpec("P")
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # set for every process by mlx.launch, or its mpirun


class Processes:
    """The processes of a run: without mlx.launch just this one, and nothing is set up.

    They wait for each other in every method that says "all", so all of them must call it.

    Raises:
        UsageError: they cannot reach each other.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.agreed = 0, 1, False
        if any(name in os.environ for name in LAUNCHED):
            import mlx.core as mx

            try:
                self.group = mx.distributed.init()
            except RuntimeError as error:
                raise UsageError(f"the processes cannot reach each other: {error}") from None
            self.rank, self.size = self.group.rank(), self.group.size()

    def least(self, value: int) -> int:
        """The smallest of all processes' numbers."""
        import mlx.core as mx

        least = mx.distributed.all_min(mx.array(value), group=self.group, stream=mx.cpu)
        return int(least.item())  # type: ignore[arg-type]  # not complex

    def first(self, values: Sequence[int]) -> list[int]:
        """Give all the first process's numbers, below 2**31; the others' values must only have the same length."""
        import mlx.core as mx

        mine = mx.array([value if self.rank == 0 else 0 for value in values], mx.int32)
        return mx.distributed.all_sum(mine, group=self.group, stream=mx.cpu).tolist()  # type: ignore[return-value]

    def agree(self, failed: bool = False) -> bool:
        """All continue, or none does. Returns whether this one failed and is the one to say why."""
        lowest, self.agreed = self.least(self.rank if failed else self.size), True
        if lowest < self.size and not failed:
            sys.exit(2)
        return lowest == self.rank

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """Load this process's part of a model. Raises UsageError like `Checkpoint.load`, or if it cannot be divided."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        model = checkpoint.load(lazy=self.size > 1)
        if self.size == 1:
            return model
        why = f"{checkpoint.name} cannot be divided among {self.size} processes"
        if not hasattr(model, "shard"):
            raise UsageError(f"{why}: mlx-lm does not divide {checkpoint.config['model_type']} models")
        for key in ("num_attention_heads", "num_key_value_heads"):
            if (checkpoint.config.get(key) or 0) % self.size:
                raise UsageError(f"{why}: {key} is {checkpoint.config[key]}")
        try:
            model.shard(self.group)
        except ValueError as error:  # features, or groups of quantized weights, that do not divide evenly
            raise UsageError(f"{why}: {error}") from None
        for _, weight in tree_flatten(model.parameters()):  # type: ignore[str-unpack]
            mx.eval(weight)  # one by one: each whole matrix is freed before the next is read
        return model

    def start(
        self, tokens: list[int], requests: list[Request], done: Collection[str | int], seed: int | None
    ) -> tuple[list[Request], int | None]:
        """Start together. Returns the requests that the first process has no answer to, and its seed.

        Raises:
            UsageError: they have read different prompts: steps that do not match would wait forever.
        """
        if self.size == 1:
            return [request for request in requests if request.id not in done], seed
        read = crc32(repr([tokens, *(request.tokens for request in requests)]).encode()) >> 1  # below 2**31
        self.agree()
        if self.least(read) != -self.least(-read):
            raise UsageError("the processes have read different prompts")
        if seed is None:
            seed = self.first([secrets.randbelow(2**31)])[0]
        missing = self.first([request.id not in done for request in requests]) if requests else []
        return [request for request, wanted in zip(requests, missing, strict=True) if wanted], seed

    def prompt_cache(self, folder: Path, max_bytes: int, identity: dict[str, Any]) -> PromptCache:
        """Make a PromptCache; every process keeps the keys and values of its own heads.

        Args:
            folder, max_bytes: as of the class.
            identity: from `cache_identity`.
        """
        from ..generation import PromptCache
        from ..generation.prompt_cache import ROTATED

        if self.size == 1:
            return PromptCache(folder, max_bytes=max_bytes, **identity)
        least, beginning = self.least, identity["beginning"]

        class Part(PromptCache):
            def known(self, tokens: Sequence[int]) -> int:
                return least(super().known(tokens))

            def fetch(self, tokens: Sequence[int], cache: list[Any]) -> int:
                known = super().fetch(tokens, cache)
                common = least(known)  # an entry may be missing, or be shorter, on another machine
                for layer in cache:
                    layer.trim(known - common)
                return common

        def of_part(key: str) -> str:
            part = sha256(f"{key} {self.rank} {self.size}".encode()).hexdigest()[:16]
            return part + (ROTATED if key.endswith(ROTATED) else "")

        own = {"key": of_part(identity["key"]), "beginning": beginning and (of_part(beginning[0]), beginning[1])}
        return Part(folder, max_bytes=max_bytes, **identity | own)


processes = cache(Processes)


def together(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command that all processes run: only the first prints; an error is printed once, and ends all of them."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if (all_of_them := processes()).size == 1:
            return command(*args, **kwargs)
        voice = sys.stderr
        if all_of_them.rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            command(*args, **kwargs)
            import mlx.core as mx

            from .._mlx_lm import generation_stream

            mx.synchronize(generation_stream)  # a step begun before the end of the text was known needs all of them
            all_of_them.agree()
        except Exception as error:
            # Once all have agreed to start, a wrong request fails in each of them, and the first says so.
            alike = isinstance(error, ValueError)
            if all_of_them.agree(failed=True) if not all_of_them.agreed else not alike:
                sys.stderr = voice
            if isinstance(error, RuntimeError) and "[ring]" in str(error):
                raise ConnectionError(f"another process has ended: {error}") from None
            raise

    return run
