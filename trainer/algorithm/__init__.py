"""Define the algorithm as equations.

Modules: advantages, shaping, losses, objectives, and plateau. Imports only torch, numpy, and ``settings``.
"""
