"""The policy: how a causal language model and its tokenizer are loaded, evaluated on tokens, and saved."""
