"""Benchmarks of long texts in lm-eval: their tasks, and the options that the published scores were made with."""

from __future__ import annotations

from typing import Any

SUITES: dict[str, tuple[str, dict[str, Any]]] = {
    "ruler": ("ruler", {}),
    "babilong": ("babilong_longctx", {}),
    "longbench": ("longbench", {"truncation": "middle"}),
    "longbench2": ("longbench2", {"truncation": "middle"}),
    "infinitebench": ("infinitebench", {"truncation": "middle"}),
    "graphwalks": ("graphwalks_128k", {"max_tokens": 2048}),  # instead of 16384, for models that think first
    "mrcr": ("mrcr", {}),
    "nolima": ("nolima", {"apply_chat_template": True}),
}
