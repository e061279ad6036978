"""Score imported rollouts with a model."""
