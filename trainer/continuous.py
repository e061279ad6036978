"""Sampling with transformers' continuous batching: where a response ends, the next one begins at once.

The library says what is computed together, and keeps keys and values in pages. Tokens are drawn and recorded as in
``trainer.rollout``: from the very logits that the forward pass gave, at the random number of their response and
position. The library's loop runs here, in the calling thread: what is computed together follows from prompts and
responses alone, neither from time nor from free memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from analysis.trace import InputError, in_one_line
from trainer.policy import Policy
from trainer.rollout import Drawing, Samples, SamplingParams

# Without a kernel for pages, every response's query meets the keys of all: time grows with the square of these.
MAX_ROWS = 64
MAX_BATCH_TOKENS = 512
PAGE_TOKENS = 16
# Share of pages that the scheduler keeps free, beyond those that responses may come to need.
FREE_FRAC = 0.15
# In nats; a model that mistakes one text for another is off by far more.
TOLERANCE = 1e-2


@torch.no_grad()
def sample_at(
    policy: Policy, prompts: list[list[int]], uniforms: np.ndarray, limits: list[int], params: SamplingParams
) -> Samples:
    """Draws responses at given random numbers; arguments and result are those of ``trainer.rollout.sample_at``.

    Equal arguments give equal results on one machine, and those of the other engine but for rounding.
    """
    drawing = Drawing(policy, prompts, uniforms, limits, params)
    samples = drawing.samples
    # An id that no token has tells the scheduler that a response has ended, for whichever reason.
    ended = policy.vocab_size
    with _paged_attention(policy.model):
        processor = _processor(policy, samples, params)
        for row, prompt in enumerate(samples.prompts):
            request = RequestState(str(row), prompt, max_new_tokens=None, eos_token_id=ended)
            processor.scheduler.add_waiting_request(request)
        while processor.has_pending_requests():
            rows, hidden = _read_batch(policy, processor)
            drawn, goes_on = drawing.draw(hidden, torch.arange(len(rows)), rows)
            tokens = drawn.second[drawn.index]
            processor.inputs_and_outputs.output_ids[0, : len(rows)] = tokens.masked_fill(~goes_on, ended)
            processor.update_batch()
    return drawing.finish()


@torch.no_grad()
def check(policy: Policy) -> None:
    """Samples a few tokens and compares their log-probabilities with those of one pass over the whole text.

    Raises:
        InputError: the model, or the transformers installed, cannot do it.
    """
    exact = replace(policy, dtype=torch.float32)
    prompts = [[i % policy.vocab_size for i in range(length)] for length in (5, 3, 1)]
    numbers = np.linspace(0.1, 0.9, 2 * len(prompts) * 4, dtype=np.float32).reshape(-1, 4)
    try:
        samples = sample_at(exact, prompts, numbers, [4] * len(prompts), SamplingParams(4))
        scored = exact.score(samples.prompts, samples.responses(), 1.0).logprob.cpu()
        off = float((samples.stats.logprob[samples.response_mask] - scored).abs().max())
        reason = None if off < TOLERANCE else f"log-probabilities are off by {off:.2g}"
    except Exception as error:
        reason = in_one_line(error)
    if reason:
        kind = type(policy.model).__name__
        raise InputError(f'rollout.engine = "continuous": {kind} cannot be sampled from that way ({reason})')


def _read_batch(policy: Policy, processor: ContinuousBatchProcessor) -> tuple[Tensor, Tensor]:
    """Reads what the scheduler puts together next; rows (N,) that a token is due to, and hidden states before it."""
    if not processor.prepare_next_batch():
        raise RuntimeError("continuous batching: responses are missing that nothing is computed for")
    batch: Any = processor.inputs_and_outputs
    rows = torch.tensor([int(r.state.request_id) for r in batch.requests_in_batch if r.has_new_token], dtype=torch.long)
    inputs = batch.get_model_kwargs()
    last = inputs.pop("logits_indices")[: len(rows)]
    del inputs["logits_processor_args"]
    return rows, policy.hidden_states(**inputs)[0, last]


@contextmanager
def _paged_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's attention is one that reads pages: its own, or torch's fused kernel in place of ours."""
    own: Any = model.config._attn_implementation
    model.set_attn_implementation("paged|eager" if own == "eager" else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class _Cache(PagedAttentionCache):
    """Pages in the dtype of the arithmetic; under autocast, keys come in another than values."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        cache: Any = super()
        return cache.update(key_states.to(self.dtype), value_states.to(self.dtype), layer_idx, kwargs)


def _processor(policy: Policy, samples: Samples, params: SamplingParams) -> ContinuousBatchProcessor:
    """The library's scheduler and cache for these prompts, without its thread, its random numbers and its graphs."""
    longest = max(map(len, samples.prompts)) + params.max_tokens
    rows = max(1, min(len(samples.prompts), MAX_ROWS, params.cache_tokens // longest))
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=math.ceil(rows * math.ceil(longest / PAGE_TOKENS) / (1 - FREE_FRAC)),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=rows,
        max_blocks_per_request=0,
        max_memory_percent=1.0,
        use_async_batching=False,
        use_cuda_graph=(False, False),
        seed=0,
    )
    model_config = policy.model.config.get_text_config()
    helper = DistributedHelper(device_mesh=None, cpu_group_timeout=None)
    cache = _Cache(model_config, config, policy.device, helper, policy.dtype)
    devices = [policy.device] if policy.device.type == "cuda" else []
    # It seeds torch, though nothing here draws from it.
    with torch.random.fork_rng(devices):
        return ContinuousBatchProcessor(
            cache=cache,
            config=model_config,
            generation_config=GenerationConfig(),
            continuous_batching_config=config,
            logit_processor=ContinuousBatchingLogitsProcessorList(LogitsProcessorList()),
            input_queue=Queue(),
            cancel_queue=Queue(),
            output_router=OutputRouter(),
            background_thread_status=BackgroundThreadStatus(),
            model_device=policy.device,
            model_dtype=policy.dtype,
            scheduler=FIFOScheduler(cache, FREE_FRAC, rows),
            distributed_helper=helper,
        )
