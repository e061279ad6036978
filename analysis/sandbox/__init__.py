"""Run a user's SQL over traces within bounds: read-only, in a process of its own, with limits of time and memory."""
