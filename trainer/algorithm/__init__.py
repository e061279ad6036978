"""Define the algorithm as equations.

Modules: method (registration), advantages, shaping, losses, objectives, and plateau. They import only torch, numpy, and
``settings``.
"""
