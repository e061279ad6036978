"""Keeping freed memory on a CPU, instead of having it from the system page by page at every operation."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h; without these, tensors of some MB come from fresh pages each time, and the system's zeroing of
# those takes longer than what is computed in them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP = 32 << 20
NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Lets the process keep memory that its tensors of up to 32 MB have freed; does nothing without glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        mallopt(M_TRIM_THRESHOLD, NEVER)
