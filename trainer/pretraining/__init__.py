"""Pretrain the embedded base policy."""
