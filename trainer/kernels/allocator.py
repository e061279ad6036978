"""Keep freed CPU memory in the process, for operations to reuse.

Operations would otherwise request new pages.
"""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt (malloc.h). By default, a tensor of a few MB gets new pages each time, and zeroing these
# takes the system longer than the computation.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP = 32 << 20
NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Keep freed memory of tensors up to 32 MB; does nothing without glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        mallopt(M_TRIM_THRESHOLD, NEVER)
