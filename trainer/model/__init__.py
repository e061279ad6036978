"""The policy: load a causal language model with its tokenizer, evaluate it on tokens, and save it."""
