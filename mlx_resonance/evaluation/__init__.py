"""What a checkpoint does with long texts: perplexity, passkey, long-text tasks."""
