"""The server against its own OpenAPI schema: requests that schemathesis makes up, right and wrong ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mlx_resonance import load
from mlx_resonance.generation import Engine

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .serving import CHAT, TEXT, Served, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BOTH = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
PARTS = {  # of the requests, and of which kinds they are: without a body, there is nothing to get wrong
    CHAT: (0.24, BOTH),
    TEXT: (0.24, BOTH),
    "/v1/models": (0.01, BOTH[:1]),
    "/v1/models/{name}": (0.03, BOTH[:1]),
    "/health": (0.01, BOTH[:1]),
}
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    """A server of the tiny checkpoint that gives short answers."""
    with serving(lambda: Engine(*load(checkpoint)), max_tokens=4) as served:
        yield served


@pytest.mark.parametrize("requests", [50, pytest.param(2000, marks=pytest.mark.long)])
def test_every_response_is_one_that_the_schema_declares(server: Served, requests: int) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(PARTS)
    statuses: Counter[tuple[str, int]] = Counter()
    for operation in operations:
        part, modes = PARTS[operation.path]
        for mode in modes:
            examples = max(1, round(requests * part))

            @seed(examples)
            @settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=HEALTH,
                phases=[Phase.generate],
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                response = case.call(timeout=120)
                statuses[case.path, response.status_code] += 1
                case.validate_response(response, checks=CHECKS)

            check()
    assert max(status for _, status in statuses) < 500  # 503 is declared, but nobody waits here
    assert {(path, status) for path in (CHAT, TEXT) for status in (200, 400)} <= set(statuses), statuses
    assert sum(statuses.values()) >= requests * 0.9
    assert server.ask("/health")[0] == 200
