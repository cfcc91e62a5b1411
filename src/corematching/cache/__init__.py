"""KV caches that remember what was dropped from them."""
