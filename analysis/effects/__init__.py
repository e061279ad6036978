"""Compute the effect behind each claim, with its interval."""
