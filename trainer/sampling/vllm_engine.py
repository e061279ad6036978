"""Sample with vLLM, in this process and on the same GPU.

The engine starts without weights. They are handed over each time before responses are sampled. Token ids come back
with the engine's log-probabilities; statistics are computed by the policy, in a pass over the responses.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrace.analysis.trace import InputError
from entrace.trainer.kernels.blocked_stats import compute_token_stats
from entrace.trainer.kernels.packing import cut_by_tokens
from entrace.trainer.model.lora import merged_weight
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.samples import Rollouts, SamplingParams

# Most tokens, with padding, that are scored at once.
SCORED_TOKENS = 1 << 14


def load_vllm() -> Any:
    """Import vLLM.

    Raises:
        InputError: it is not installed.
    """
    # The engine shares this process, so that weights are handed over in place.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return import_module("vllm")
    except ImportError:
        raise InputError('rollout.engine = "vllm" needs vLLM: pip install \'vllm>=0.11\', or set "native"') from None


class VllmSampler:
    """Sample from the current weights of a policy with vLLM."""

    def __init__(self, policy: Policy, memory: float) -> None:
        """Start the engine.

        Args:
            policy: The model.
            memory: Share of the GPU's memory that vLLM may take, for weights and KV cache.

        Raises:
            InputError: vLLM is not installed, or the policy is sharded.
        """
        vllm = load_vllm()
        if policy.is_sharded:
            raise InputError(
                'rollout.engine = "vllm": weights are sharded (FSDP); set "native" or launch with ddp.yaml'
            )
        self._vllm = vllm
        # Engines are kept by policy, and must not keep it.
        self._policy = weakref.proxy(policy)
        with tempfile.TemporaryDirectory() as folder:
            policy.model.config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            self._llm = vllm.LLM(
                model=folder,
                load_format="dummy",
                dtype=str(policy.dtype).removeprefix("torch."),
                gpu_memory_utilization=memory,
                # After temperature, top-k, and top-p: of the distribution that is sampled from.
                logprobs_mode="processed_logprobs",
            )

    def sample(
        self,
        prompts: list[list[int]],
        num_samples: int,
        params: SamplingParams,
        rng: np.random.Generator,
        part: slice = slice(None),
    ) -> Rollouts:
        """Sample ``num_samples`` responses per prompt of a part.

        Each prompt has its own seed.

        Returns:
            ``Rollouts`` as of ``sampler.sample``, with ``sampling_logprob``.
        """
        self._hand_over_weights()
        seeds = rng.integers(1 << 31, size=len(prompts)).tolist()[part]
        stop_ids = self._policy.stop_ids.tolist()
        settings = [
            self._vllm.SamplingParams(
                n=num_samples,
                temperature=params.temperature,
                top_p=params.truncation.top_p,
                top_k=params.truncation.top_k or 0,
                max_tokens=params.max_tokens,
                stop=list(params.stop) or None,
                stop_token_ids=stop_ids,
                ignore_eos=not stop_ids,
                seed=seed,
                # Of the sampled token only.
                logprobs=0,
            )
            for seed in seeds
        ]
        chosen = prompts[part]
        found = self._llm.generate([{"prompt_token_ids": ids} for ids in chosen], settings, use_tqdm=False)
        rollouts = Rollouts.empty([ids for ids in chosen for _ in range(num_samples)], params.max_tokens)
        rollouts.sampling_logprob = torch.zeros(rollouts.response_ids.shape)
        for row, output in enumerate(output for request in found for output in request.outputs):
            ids = list(output.token_ids)
            rollouts.response_ids[row, : len(ids)] = torch.tensor(ids)
            rollouts.response_mask[row, : len(ids)] = True
            reported = [entries[token].logprob for token, entries in zip(ids, output.logprobs, strict=True)]
            rollouts.sampling_logprob[row, : len(ids)] = torch.tensor(reported)
            rollouts.is_truncated[row] = output.finish_reason == "length"
        self._score(rollouts, params)
        return rollouts

    def _hand_over_weights(self) -> None:
        """Load the policy's current weights into the engine.

        Prefixes that the engine cached with other weights are dropped.
        """
        model = self._policy.model
        self._llm.apply_model(lambda theirs: theirs.load_weights(whole_weights(model)))
        self._llm.reset_prefix_cache()

    @torch.no_grad()
    def _score(self, rollouts: Rollouts, params: SamplingParams) -> None:
        """Compute the statistics of all tokens under the policy's weights."""
        policy = self._policy
        lengths = rollouts.lengths + torch.tensor([len(prompt) for prompt in rollouts.prompt_ids])
        for rows in cut_by_tokens(lengths, SCORED_TOKENS, is_padded=not policy.uses_packing):
            prompts = [rollouts.prompt_ids[row] for row in rows]
            hidden, targets, index = policy.forward_unique(prompts, rollouts.responses(rows))
            stats = compute_token_stats(hidden, policy.head, targets, params.temperature, params.truncation)
            for name, values in vars(stats.take(index)).items():
                getattr(rollouts.stats, name)[rows] = rollouts.place(values, rows)
            rollouts.hidden_norm[rows] = rollouts.place(hidden.float().norm(dim=-1)[index], rows)


def whole_weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights under their checkpoint names, adapters merged."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            weight = merged_weight(modules[owner]) if kind == "weight" else parameter
            yield f"{owner}.{kind}", weight.detach()
        elif ".lora_" not in name:
            yield name, parameter.detach()
