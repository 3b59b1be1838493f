"""Many requests in one process: no wrong token, and no memory leak."""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path
from typing import Any

from mlx_resonance import load, stream_generate
from mlx_resonance.generation import PromptCache

import mlx.core as mx
import pytest

from .checkpoints import prompt

SETTLED, NEW = 20, 12


def resident() -> int:
    """Resident bytes of this process; 0 if the system does not report them."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# `make test` runs enough requests to notice a leak of one document's memory; the others are run every night.
@pytest.mark.parametrize("requests", [40, pytest.param(2000, marks=pytest.mark.long)])
def test_requests_of_every_kind(requests: int, checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load(checkpoint, factor=4)
    chance = random.Random(0)
    documents = [prompt(tokenizer, 400, start=1000 * i) for i in range(4)]
    lengths = [20, 75, 140, 260, 400]
    expected = {
        (i, length): [r.token for r in stream_generate(model, tokenizer, tokens[:length], max_tokens=NEW)]
        for i, tokens in enumerate(documents)
        for length in lengths
    }

    def interrupt(*_: int) -> None:
        if chance.random() < 0.4:
            raise KeyboardInterrupt

    size = 400 * 2 * 5 * 2 * 64 * 4  # bytes of a document
    ends = dict.fromkeys(("whole", "closed", "interrupted"), 0)
    evictions, known = 0, set[str]()
    active = process = 0
    for number in range(requests):
        i, length = chance.randrange(4), chance.choice(lengths)
        kind = chance.choice(["whole", "whole", "closed", "interrupt"])
        kept = PromptCache(tmp_path / "kept", "0123456789abcdef", int(1.5 * size)) if chance.random() < 0.7 else None
        options: dict[str, Any] = {"max_tokens": NEW, "prefill_step_size": chance.choice([16, 64, 2048])}
        options |= {"prompt_progress_callback": interrupt} if kind == "interrupt" else {}
        responses = stream_generate(model, tokenizer, documents[i][:length], disk_cache=kept, **options)
        stop, answer = chance.randrange(1, NEW), []
        try:
            for response in responses:
                answer.append(response.token)
                if kind == "closed" and len(answer) == stop:
                    break
        except KeyboardInterrupt:
            ends["interrupted"] += 1
        else:
            ends["closed" if kind == "closed" else "whole"] += 1
            wanted = expected[i, length]
            assert answer == (wanted[:stop] if kind == "closed" else wanted), number
        responses.close()
        del responses
        if (tmp_path / "kept").exists():
            now = {path.name for path in (tmp_path / "kept").iterdir()}
            evictions += len(known - now)
            known = now
        if number + 1 in (SETTLED, requests):
            gc.collect()
            mx.clear_cache()
            before, active, process = (active, process), mx.get_active_memory(), resident()
    assert active <= 1.02 * before[0] and process <= 1.02 * before[1], (before, active, process)
    assert min(ends.values()) >= requests / 10 and evictions >= requests / 10, (ends, evictions)
