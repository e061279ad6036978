"""Train with GRPO and record every token; the public names are in ``entrace``."""
