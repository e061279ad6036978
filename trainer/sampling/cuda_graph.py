"""Capture of GPU work in a CUDA graph, which launches all of its kernels at once.

A decoding step takes a GPU a few milliseconds, and Python many times as long to launch. A CUDA graph launches the whole
step at once, with the memory addresses and sizes of its capture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """Run work at fixed memory addresses, captured in a CUDA graph."""

    def __init__(self) -> None:
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, work: Callable[[], Tensor]) -> Tensor:
        """Run the work, from the second call on as a CUDA graph.

        The first call runs plainly, the second is captured and replayed, and later calls are replayed. The first call
        loads kernels, which is not allowed during capture. Without a GPU, every call runs plainly.

        Args:
            work: The same work in every call. No reference is kept, since it may refer to the owner of this object.

        Returns:
            The result of the work, valid until the next call.
        """
        if not self._is_warm or not torch.cuda.is_available():
            self._is_warm = True
            return work()
        if self._graph is None or self._result is None:
            self._graph = torch.cuda.CUDAGraph()
            self._result = _capture(self._graph, work, _pool_graph().pool())
        self._graph.replay()
        return self._result


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], Tensor], pool: Any) -> Tensor:
    # As torch.cuda.graph, without emptying the allocator's cache.
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
    """Return the stream of all captures.

    Graphs reuse each other's memory only on the same stream.
    """
    return torch.cuda.Stream()


@cache
def _pool_graph() -> torch.cuda.CUDAGraph:
    """Return a minimal graph that owns the memory pool of all graphs.

    The pool lives as long as any graph uses it.
    """
    graph = torch.cuda.CUDAGraph()
    _capture(graph, lambda: torch.zeros(1, device="cuda"), None)
    return graph
