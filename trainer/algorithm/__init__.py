"""The algorithm as equations: advantages, shaping, losses, objectives, plateau; imports torch, numpy, settings."""
