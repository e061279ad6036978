"""Measure the CPU memory that work takes from torch's allocator.

The state of memory is reset before the work.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the peak memory that ``work`` allocates, in bytes, including its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        left = work()
    results: Any = recording.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    del left
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def give_back_memory() -> None:
    """Return freed memory of the process to the system; does nothing without glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
