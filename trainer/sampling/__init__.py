"""Sample responses with a KV cache."""
