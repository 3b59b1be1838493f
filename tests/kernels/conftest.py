"""Settings of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_resonance.kernels import kernel

import hypothesis
import pytest

# Of mutants.py: a test that fails is enough; to find a smaller example takes minutes.
hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate])


@pytest.fixture(scope="module")
def eight_heads_per_thread() -> Iterator[None]:
    """Also in launches so small that a thread would take one head, unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "FEW_TOKENS", 0)
        yield
