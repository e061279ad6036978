"""Load a causal language model with its tokenizer, evaluate it, and save it."""
