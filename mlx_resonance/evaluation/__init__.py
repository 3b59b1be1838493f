"""Evaluation of a checkpoint on long texts: perplexity, passkeys, the tasks of several benchmarks."""
