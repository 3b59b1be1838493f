"""The OpenAI-compatible server: one engine, one request at a time, a bounded queue."""
