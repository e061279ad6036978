"""Select, once per policy, the fastest exact way to decode.

Decoding is exact if it gives the same distributions as the plain model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from entrace.analysis.trace import InputError, in_one_line
from entrace.trainer.kernels.token_stats import uses_triton
from entrace.trainer.model.policy import Policy, is_close
from entrace.trainer.sampling.batched import BatchedSampler
from entrace.trainer.sampling.decoder import Decoder
from entrace.trainer.sampling.jit_step import StepGraph
from entrace.trainer.sampling.samples import SamplingParams

log = logging.getLogger("entrace")

ON = "on"
SHARDED = "off for sharded weights"
PACKING, NORMS, TRACED_STEP, BATCHED, COMPILED, CUDA_GRAPH, TRITON = FAST_PATHS = (
    "sequence packing",
    "RMSNorm kernel",
    "traced decoding step",
    "batched sampling",
    "torch.compile",
    "CUDA graph",
    "Triton kernels",
)


@dataclass(frozen=True)
class Backend:
    """Hold the selected way to decode, and the state of every fast path.

    Attributes:
        step_graph: Traced decoding step for short sequences on a CPU, or None.
        uses_cuda_graph: Decoding steps of ``Decoder`` are captured in a CUDA graph.
        batched: Sampler without prefix sharing per token, for a GPU, or None; ``Decoder`` is used if None.
        fast_paths: For each of ``FAST_PATHS``, ``on`` or the reason why it is off.
    """

    step_graph: StepGraph | None
    uses_cuda_graph: bool
    batched: BatchedSampler | None
    fast_paths: dict[str, str]

    def decode(self, policy: Policy, prompts: list[list[int]], num_slots: int, max_tokens: int) -> Decoder:
        """Return a decoder that has read the prompts; see ``Decoder``."""
        return Decoder(
            policy,
            prompts,
            num_slots,
            self.step_graph,
            max_tokens=max_tokens,
            uses_cuda_graph=self.uses_cuda_graph,
        )

    def for_sharded(self) -> Backend:
        """Return this backend without the paths that need unsharded weights.

        These paths read weights in place.
        """
        names = (TRACED_STEP, BATCHED, COMPILED, CUDA_GRAPH)
        off = {name: SHARDED for name in names if self.fast_paths[name] == ON}
        return Backend(None, False, None, {**self.fast_paths, **off})


_BACKENDS: WeakKeyDictionary[Policy, Backend] = WeakKeyDictionary()


def backend_of(policy: Policy) -> Backend:
    """Return the backend of a policy, selected on first use and logged once.

    Every way to decode is compared with the plain model on two short texts. A way that fails or differs is not used,
    and ``fast_paths`` gives the reason. Select before the policy is sharded: the comparison reads all weights.

    Raises:
        InputError: the model cannot continue from a KV cache.
    """
    if policy not in _BACKENDS:
        _BACKENDS[policy] = _select(policy)
    backend = _BACKENDS[policy]
    return backend.for_sharded() if policy.is_sharded else backend


def _select(policy: Policy) -> Backend:
    # In float32, so that rounding is not mistaken for a difference.
    exact = replace(policy, dtype=torch.float32)
    if reason := _why_not(lambda: _can_decode(exact)):
        kind = type(policy.model).__name__
        raise InputError(f"{policy.name}: {kind} cannot be sampled with a KV cache ({reason})")
    graph, why_untraced = _trace_step(policy)
    fast_paths = {
        PACKING: policy.why_unpacked or ON,
        NORMS: policy.why_plain_norms or ON,
        TRACED_STEP: why_untraced or ON,
        **dict.fromkeys((BATCHED, COMPILED, CUDA_GRAPH), "no CUDA device"),
        TRITON: ON if uses_triton(policy.device) else "no CUDA device or no Triton",
    }
    batched, uses_cuda_graph = None, False
    if policy.device.type == "cuda":
        batched = _try_batched(policy, exact, fast_paths)
        if batched is None:
            uses_cuda_graph = not (reason := _why_not(lambda: _can_decode(exact, uses_cuda_graph=True)))
            fast_paths[CUDA_GRAPH] = reason or ON
    log.info("fast paths: %s", "; ".join(f"{name}: {state}" for name, state in fast_paths.items()))
    return Backend(graph, uses_cuda_graph, batched, fast_paths)


def _try_batched(policy: Policy, exact: Policy, fast_paths: dict[str, str]) -> BatchedSampler | None:
    """Return a sampler with as many of its fast paths as work, or None.

    Their states are set in ``fast_paths``. Each is left out in turn: first ``torch.compile``, then the CUDA graph.
    """
    ways = [(True, True), (False, True), (False, False)]
    reasons = []
    for compiles, captures in ways:
        reason = _why_not(lambda c=compiles, g=captures: can_sample(exact, compiles=c, captures=g))
        if not reason:
            fast_paths[BATCHED] = ON
            fast_paths[COMPILED] = ON if compiles else reasons[0]
            fast_paths[CUDA_GRAPH] = ON if captures else reasons[-1]

            def note(why: str) -> None:
                fast_paths[CUDA_GRAPH] = why

            return BatchedSampler(policy, captures=captures, compiles=compiles, note=note)
        reasons.append(reason)
    fast_paths[BATCHED] = fast_paths[COMPILED] = reasons[-1]
    return None


def _trace_step(policy: Policy) -> tuple[StepGraph | None, str]:
    """Return the traced decoding step, or None and the reason why there is none."""
    if policy.device.type != "cpu" or policy.dtype != torch.float32:
        return None, "only on a CPU in float32"
    traced: list[StepGraph] = []

    def trace() -> bool:
        # Traced on other sequences than those of the comparison.
        traced.append(Decoder(policy, [[0, 1 % policy.vocab_size], [0]] * 2, 4).trace_step())
        return _can_decode(policy, traced[0])

    reason = _why_not(trace)
    return (None, reason) if reason else (traced[0], "")


def _why_not(attempt: Callable[[], bool]) -> str:
    """Return why an attempt failed, or an empty string."""
    try:
        return "" if attempt() else "results differ from those of the plain model"
    except Exception as error:
        # Torch turns a warning inside a tracing callback into a SystemError caused by the warning.
        return in_one_line((error.__cause__ or error) if isinstance(error, SystemError) else error)


@torch.no_grad()
def _can_decode(policy: Policy, graph: StepGraph | None = None, *, uses_cuda_graph: bool = False) -> bool:
    """Decode two texts of different lengths together from the cache, as a test.

    The result is compared with a plain pass over each text.
    """
    texts = [[i % policy.vocab_size for i in range(length)] for length in (8, 6)]
    prompts = [text[:-3] for text in (texts[1], *texts)]
    decoder = Decoder(policy, prompts, 3, graph, uses_cuda_graph=uses_cuda_graph)
    # With a CUDA graph, the first step runs plainly, the second is captured, and the third is replayed.
    for place, parents in ((-3, [1, 2]), (-2, [0, 1]), (-1, [0, 1])):
        decoder.append(torch.tensor([text[place] for text in texts]), torch.tensor(parents))
    alone = [policy.hidden_states(torch.tensor([t], device=policy.device), use_cache=False)[0, -1] for t in texts]
    return is_close(decoder.hidden, torch.stack(alone))


@torch.no_grad()
def can_sample(policy: Policy, *, compiles: bool = False, captures: bool = False) -> bool:
    """Test the sampler on two prompts of different lengths against a plain pass.

    Raises:
        ValueError: the model has other parts than a Llama-like one.
        RuntimeError: a step cannot be compiled or captured.
    """
    reasons: list[str] = []
    sampler = BatchedSampler(policy, captures=captures, compiles=compiles, note=reasons.append)
    prompts = [[i % policy.vocab_size for i in range(1, length)] for length in (9, 6)]
    uniforms = np.random.default_rng(0).random((4, 4), dtype=np.float32)
    # With a CUDA graph, the first step runs plainly, the second is captured, and the third is replayed.
    rollouts = sampler.sample_at(prompts, uniforms, [4, 4], SamplingParams(4))
    if reasons:
        raise RuntimeError(reasons[0])
    found = rollouts.stats.logprob[rollouts.response_mask]
    expected = policy.token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0).logprob.cpu()
    return is_close(found, expected)
