"""Select, once per policy, the fastest way to decode that gives the same distributions as the plain model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from entrace.analysis.trace import InputError, in_one_line
from entrace.trainer.kernels.token_stats import uses_triton
from entrace.trainer.model.policy import Policy, is_close
from entrace.trainer.sampling.decoder import Decoder
from entrace.trainer.sampling.jit_step import StepGraph

log = logging.getLogger("entrace")

ON = "on"


@dataclass(frozen=True)
class Backend:
    """How responses of a policy are decoded.

    Attributes:
        policy: The policy.
        step_graph: Traced decoding step for short sequences on a CPU, or None.
        uses_cuda_graph: Whether decoding steps are captured in a CUDA graph.
        fast_paths: ``on``, or the reason why not, by name of the fast path.
    """

    policy: Policy
    step_graph: StepGraph | None
    uses_cuda_graph: bool
    fast_paths: dict[str, str]

    def decode(self, prompts: list[list[int]], num_slots: int, max_tokens: int) -> Decoder:
        """Return a decoder that has read the prompts; see ``Decoder``."""
        # Both fast paths read the weights in place, which sharded weights do not allow.
        is_whole = not self.policy.is_sharded
        return Decoder(
            self.policy,
            prompts,
            num_slots,
            self.step_graph if is_whole else None,
            max_tokens=max_tokens,
            replays=self.uses_cuda_graph and is_whole,
        )


_BACKENDS: WeakKeyDictionary[Policy, Backend] = WeakKeyDictionary()


def backend_of(policy: Policy) -> Backend:
    """Return the backend of a policy, selected on first use.

    Every way to decode is compared with the plain model on two short texts; one that fails or differs is not used, and
    ``fast_paths`` says why.

    Raises:
        InputError: the model cannot continue from a KV cache.
    """
    if policy not in _BACKENDS:
        _BACKENDS[policy] = _select(policy)
    return _BACKENDS[policy]


def _select(policy: Policy) -> Backend:
    # In float32, so that rounding does not pass for a difference.
    exact = replace(policy, dtype=torch.float32)
    if reason := _why_not(lambda: _can_decode(exact)):
        kind = type(policy.model).__name__
        raise InputError(f"{policy.name}: {kind} cannot be sampled with a KV cache ({reason})")
    graph, traced = _trace_step(policy)
    replayed = _try_cuda_graph(policy, exact)
    fast_paths = {
        "sequence packing": policy.why_unpacked or ON,
        "traced decoding step": traced,
        "CUDA graph": replayed,
        "Triton statistics": ON if uses_triton(policy.device) else "no CUDA device or no Triton",
    }
    log.info("fast paths: %s", ", ".join(f"{name}: {state}" for name, state in fast_paths.items()))
    return Backend(policy, graph, replayed == ON, fast_paths)


def _trace_step(policy: Policy) -> tuple[StepGraph | None, str]:
    if policy.device.type != "cpu" or policy.dtype != torch.float32:
        return None, "only on a CPU in float32"
    if policy.is_sharded:
        return None, "weights are sharded"
    found: list[StepGraph] = []

    def trace() -> bool:
        # On other sequences than those that it is tried with.
        found.append(Decoder(policy, [[0, 1 % policy.vocab_size], [0]] * 2, 4).trace_step())
        return _can_decode(policy, found[0])

    reason = _why_not(trace)
    return (None, reason) if reason else (found[0], ON)


def _try_cuda_graph(policy: Policy, exact: Policy) -> str:
    if policy.device.type != "cuda":
        return "no CUDA device"
    if policy.is_sharded:
        return "weights are sharded"
    return _why_not(lambda: _can_decode(exact, replays=True)) or ON


def _why_not(attempt: Callable[[], bool]) -> str:
    """Return why an attempt failed, or an empty string."""
    try:
        return "" if attempt() else "results differ from those of the plain model"
    except Exception as error:
        return in_one_line(error)


@torch.no_grad()
def _can_decode(policy: Policy, graph: StepGraph | None = None, *, replays: bool = False) -> bool:
    """Decode two texts of different lengths together from the cache, and compare with each text read alone."""
    texts = [[i % policy.vocab_size for i in range(length)] for length in (8, 6)]
    decoder = Decoder(policy, [text[:-3] for text in (texts[1], *texts)], 3, graph, replays=replays)
    # The first pass runs as it is, the second is captured, the third replayed.
    for place, parents in ((-3, [1, 2]), (-2, [0, 1]), (-1, [0, 1])):
        decoder.append(torch.tensor([text[place] for text in texts]), torch.tensor(parents))
    alone = [policy.hidden_states(torch.tensor([t], device=policy.device), use_cache=False)[0, -1] for t in texts]
    return is_close(decoder.hidden, torch.stack(alone))
