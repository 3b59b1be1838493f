"""On PYTHONPATH, no PyTorch: as it is for users, whose transformers then starts in half of the time."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
