"""Run a user's SQL over traces within bounds.

The SQL is read-only and runs in its own process, with limits on time and memory.
"""
