"""What a piece of work takes from torch's CPU allocator, and the state that it finds memory in."""

import ctypes
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes held at once of what ``work`` allocated, what it leaves behind included."""
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
    """Returns what the process has freed to the system; does nothing without glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
