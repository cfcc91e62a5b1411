"""KV caches of shortened prompts."""
