"""Job on a GPU whose kernels are recorded once and launched again as one.

To read one more token of each sequence, a GPU computes for a few milliseconds what takes Python many times as long to
launch. A CUDA graph launches all of it at once, on the memory, and with the sizes, that it was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Replay:
    """What was recorded of work that finds its arguments in the same memory each time."""

    def __init__(self) -> None:
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, work: Callable[[], Tensor]) -> Tensor:
        """Does the work: as it is at first, which loads kernels as cannot be done while recording, then recorded.

        Args:
            work: The same each time. It is not kept: it may hold on to whoever calls.

        Returns:
            What it returns, good until the next time.
        """
        if not self._is_warm or not torch.cuda.is_available():
            self._is_warm = True
            return work()
        if self._graph is None or self._result is None:
            self._graph = torch.cuda.CUDAGraph()
            self._result = _record(self._graph, work, _kept_graph().pool())
        self._graph.replay()
        return self._result


def _record(graph: torch.cuda.CUDAGraph, work: Callable[[], Tensor], pool: Any) -> Tensor:
    # What torch.cuda.graph does, but for giving back all of the memory that is kept for later.
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            result = work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@cache
def _side_stream() -> torch.cuda.Stream:
    """Graphs are recorded beside the default stream; memory passes from one to the next within the same."""
    return torch.cuda.Stream()


@cache
def _kept_graph() -> torch.cuda.CUDAGraph:
    """A graph of next to nothing. As long as it is there, memory that graphs have used is kept for the next ones."""
    graph = torch.cuda.CUDAGraph()
    _record(graph, lambda: torch.zeros(1, device="cuda"), None)
    return graph
