"""Tests on SmolLM2-135M-Instruct, a model that others have trained. Their answers are such that a person can check."""
