"""Settings of the kernel tests."""

from __future__ import annotations

import hypothesis

# Of mutants.py: a test that fails is enough; to find a smaller example takes minutes.
hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate])
