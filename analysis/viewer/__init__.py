"""Show traces on a local web page: figures, responses, tokens, and SQL."""
