"""Comparison with other runtimes."""
