"""Replace a token, continue both ways, and compare the outcomes."""
