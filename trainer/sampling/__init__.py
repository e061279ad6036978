"""Sampling of responses with a KV cache."""
