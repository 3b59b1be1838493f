"""Sizes of memory and files as people write them, in powers of ten."""

from __future__ import annotations

import re

from .errors import UsageError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str, option: str) -> int:
    """Parse `5GB`, `500MB`, … into bytes. Raises UsageError about `option` for anything else."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(KB|MB|GB|TB)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{option} must be a size such as 500MB or 5GB, got {text!r}", option=option)
    return int(float(found[1]) * UNITS[found[2]])


def format_size(size: float) -> str:
    """Format bytes for people, e.g. 1,203.25 GB or 118.4 MB."""
    megabytes = round(size / 1e6, 1)
    return f"{size / 1e9:,.2f} GB" if megabytes >= 1000 else f"{megabytes:.1f} MB"
