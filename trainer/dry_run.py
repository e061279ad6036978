"""Plan the memory of a run, without weights or prompts.

The configuration and the shape of the model determine the plan. The memory of the update is measured, not computed: one
micro-batch of the longest sequences runs forward and backward on fake tensors, and the peak of their sizes is counted.
Gradient checkpointing, adapters, precision, and any architecture are therefore included. The rest, in bytes::

    state    4 P + (4 + 8) P_t            float32 weights; of those trained, gradients and AdamW's two moments
             + 4 P with a reference       the frozen policy of loss.kl_coef or record.reference
    sampling 2 c K D b (L + 1)            KV cache of c = rollout.cache_tokens tokens; a growing layer counts twice
             + 2 P in 16 bits             the copy of the weights that autocast keeps
             + 4 * 4 V rows               logits and tensors derived from them

with P parameters, P_t of them trained, V vocabulary entries, L layers of K key-value heads of D numbers of b bytes.
FSDP (arXiv 2304.11277) divides the state by the number of devices; an update then gathers the largest layers, two at a
time, and sampling all weights, 4 P.
"""

from __future__ import annotations

import math
import tomllib
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from entrace.analysis.trace import InputError, in_one_line
from entrace.trainer.config import Config
from entrace.trainer.kernels.blocked_stats import BLOCK, compute_token_stats
from entrace.trainer.model import lora as adapters
from entrace.trainer.model.policy import Policy
from entrace.trainer.parallel.sharding import blocks
from entrace.trainer.resources import PACKAGE, find_local_model

SHAPES = PACKAGE / "shapes.toml"
# Assumed prompt length if the configuration does not bound it and the few-shot template is not longer.
PROMPT_TOKENS = 256
# Measured on templates of sums, which hold few words and many digits.
CHARACTERS_PER_TOKEN = 2.5
# Smallest and largest record of a token, and of its share of all other tables, bytes: measured on 100 steps of the
# embedded policy (512 entries), and on its first steps with English texts and ids of 49,152 entries by Zipf's law.
TOKEN_BYTES, OTHER_BYTES = (8.6, 12.7), (1.3, 2.1)
# Of a column that is recorded on request, per token: measured on the embedded policy, and without any compression.
COLUMN_BYTES = (3.5, 4.0)


@dataclass
class MemoryPlan:
    """Peak memory of a run on each of ``devices`` devices, in bytes.

    Attributes:
        model: ``policy.path``.
        shape_from: Source of the model's shape.
        parameters: Number of parameters.
        trained: Number of trained parameters.
        dtype: Data type of the arithmetic.
        devices: Number of processes, one per device.
        rewards: Rewards of an incorrect and of a correct response.
        length_penalty: Largest deduction for length.
        responses_per_step: Responses before refills.
        tokens_per_step: Tokens before refills if all responses reach the length limit.
        max_rounds: Most generation rounds per step, refills included.
        steps: Number of steps.
        token_steps: Steps whose tokens are stored.
        token_responses: Share of the responses of these steps whose tokens are stored.
        trace_bytes: Trace size of all steps with these tokens, for the smallest and the largest record measured.
        sequence_tokens: Longest prompt and response together.
        state: Weights, gradients, moments, and the reference policy.
        sampling: Additional memory of sampling.
        update: Additional memory of a micro-batch.
        gathered: Additional memory of an update with FSDP: the layers gathered for computation.
    """

    model: str
    shape_from: str
    parameters: int
    trained: int
    dtype: str
    devices: int
    rewards: tuple[float, float]
    length_penalty: float
    responses_per_step: int
    tokens_per_step: int
    max_rounds: int
    steps: int
    token_steps: int
    token_responses: float
    trace_bytes: tuple[int, int]
    sequence_tokens: int
    state: int
    sampling: int
    update: int
    gathered: int

    @property
    def peak(self) -> int:
        """Return the memory per device if each holds the full state, bytes."""
        return self.state + max(self.sampling, self.update)

    @property
    def sharded_peak(self) -> int:
        """Return the memory per device if the state is sharded (FSDP), bytes."""
        return self.state // self.devices + max(self.sharded_sampling, self.gathered + self.update)

    @property
    def sharded_sampling(self) -> int:
        """Return the additional memory of sampling if the state is sharded, bytes.

        Sampling gathers all weights.
        """
        return self.sampling + 4 * self.parameters

    def lines(self) -> list[str]:
        """Return the plan as text, one line per fact."""
        low, high = (size / 1e9 for size in self.trace_bytes)
        longest = self.tokens_per_step // self.responses_per_step
        wrong, right = self.rewards
        rows = (
            ("state", self.state, self.state // self.devices),
            ("sampling", self.sampling, self.sharded_sampling),
            ("update", self.update, self.gathered + self.update),
            ("peak", self.peak, self.sharded_peak),
        )
        return [
            f"model         {self.model}, {self.parameters:,} parameters, {self.trained:,} trained",
            f"shape         from {self.shape_from}",
            f"rewards       {wrong:g} wrong, {right:g} right, at most {self.length_penalty:g} deducted for length",
            f"per step      {self.responses_per_step:,} responses of up to {longest:,} tokens",
            f"tokens        {self.tokens_per_step:,} per step at most, x {self.max_rounds} with all refills",
            f"trace         {low:.3g} to {high:.3g} GB for {self.steps:,} steps of these tokens, which are stored for "
            f"{100 * self.token_responses:.3g}% of the responses on {self.token_steps:,} steps",
            f"memory        per device, {self.dtype}, sequences of {self.sequence_tokens:,} tokens, GB",
            f"              {'unsharded':>12} {f'FSDP over {self.devices}':>14}",
            *(f"  {name:12}{full / 1e9:>12.2f} {sharded / 1e9:>14.2f}" for name, full, sharded in rows),
        ]


def make_plan(config: Config, devices: int = 1) -> MemoryPlan:
    """Plan a run on ``devices`` devices.

    ``policy.dtype = "auto"`` counts as on a GPU.

    Raises:
        InputError: the shape of the model is unknown.
    """
    shape, shape_from = find_shape(config.policy.path)
    dtype = "bfloat16" if config.policy.dtype == "auto" else config.policy.dtype
    rollout = config.rollout
    of_template = math.ceil(len(config.policy.template or "") / CHARACTERS_PER_TOKEN)
    prompt_tokens = config.task.max_prompt_tokens or max(PROMPT_TOKENS, of_template)
    longest = prompt_tokens + rollout.max_response_tokens
    responses = rollout.prompts_per_step * rollout.group_size
    tokens = responses * rollout.max_response_tokens
    policy = _build(config, shape, getattr(torch, dtype))
    parameters = [p.numel() for p in policy.model.parameters()]
    trained = [p.numel() for p in policy.model.parameters() if p.requires_grad]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in blocks(policy.model)]
    # The embedding or the head may be larger than a decoder layer.
    layers += [p for p in parameters if p > max(layers)]
    record, steps = config.record, range(1, config.steps + 1)
    token_steps = sum(
        record.captures(step) or record.token_sampling.has_step(step, is_last=step == config.steps) for step in steps
    )
    rows = max(1, min(responses // devices, rollout.cache_tokens // longest))
    return MemoryPlan(
        model=config.policy.path,
        shape_from=shape_from,
        parameters=sum(parameters),
        trained=sum(trained),
        dtype=dtype,
        devices=devices,
        rewards=config.task.reward_values,
        length_penalty=config.overlong_penalty if rollout.overlong_buffer_tokens else 0.0,
        responses_per_step=responses,
        tokens_per_step=tokens,
        max_rounds=1 + rollout.max_refills * rollout.dynamic_sampling,
        steps=config.steps,
        token_steps=token_steps,
        token_responses=config.record.token_responses,
        trace_bytes=trace_bytes(
            tokens * config.steps,
            tokens * token_steps * config.record.token_responses,
            columns=2 * config.record.vocabulary_sums + 2 * config.record.reference,
        ),
        sequence_tokens=longest,
        state=4 * sum(parameters) * (1 + bool(config.loss.kl_coef or config.record.reference)) + 12 * sum(trained),
        sampling=_sampling_bytes(policy, rows, longest),
        update=_update_bytes(policy, max(1, config.optim.micro_batch_tokens // longest), longest, prompt_tokens),
        gathered=4 * sum(sorted(layers)[-2:]),
    )


def trace_bytes(tokens: float, stored: float, columns: int = 0) -> tuple[int, int]:
    """Return the smallest and the largest size of a trace, bytes.

    Args:
        tokens: Sampled tokens.
        stored: Tokens in table ``tokens``.
        columns: Columns of stored tokens that are recorded on request.
    """
    sizes = zip(TOKEN_BYTES, COLUMN_BYTES, OTHER_BYTES, strict=True)
    low, high = (round(stored * (each + columns * column) + tokens * other) for each, column, other in sizes)
    return low, high


def find_shape(name: str) -> tuple[PreTrainedConfig, str]:
    """Return the config of the model that ``policy.path`` names, and its source.

    The config holds the architecture and its sizes.

    Raises:
        InputError: the model is not a local folder or file, not in shapes.toml, and its config.json is not on the hub.
    """
    known = tomllib.loads(SHAPES.read_text(encoding="utf-8"))
    if found := find_local_model(name):
        base = adapters.read_base(found) if found.is_dir() else None
        if base:
            return find_shape(base)
        where = {"gguf_file": found.name} if found.is_file() else {}
        return _read_config(found.parent if found.is_file() else found, **where), str(found)
    if name in known:
        sizes = dict(known[name])
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes), "the shipped shapes"
    return _read_config(name), "the model hub"


def _read_config(place: Any, **where: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = in_one_line(error)
        raise InputError(f"policy.path: the shape of {place} is unknown ({reason})") from None


def _build(config: Config, shape: PreTrainedConfig, dtype: torch.dtype) -> Policy:
    attention = (
        {} if config.policy.attention in ("auto", "packed") else {"attn_implementation": config.policy.attention}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **attention).eval()
        adapter = adapters.add_adapter(model, config.policy.lora, config.policy.path) if config.policy.lora else None
    no_tokenizer = cast("Any", None)
    policy = Policy(model, no_tokenizer, torch.device("cpu"), dtype, config.policy.path, adapter=adapter)
    if config.policy.gradient_checkpointing:
        policy.checkpoint_layers()
    return policy


def _sampling_bytes(policy: Policy, rows: int, tokens: int) -> int:
    shape: Any = policy.model.config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    cache = 2 * rows * tokens * heads * size * policy.dtype.itemsize * (shape.num_hidden_layers + 1)
    low_precision = 0 if policy.dtype == torch.float32 else 2 * sum(p.numel() for p in policy.model.parameters())
    # Logits, both parts of their softmax, and the same amount for drawing and recording.
    return cache + low_precision + 5 * 4 * policy.vocab_size * rows


def _update_bytes(policy: Policy, rows: int, tokens: int, prompt_tokens: int) -> int:
    """Return the peak memory of forward and backward, bytes.

    The batch has ``rows`` x ``tokens`` tokens. Weights and gradients are not included.
    """
    # Autocast does not support the device "meta".
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = policy.model.to_empty(device="cpu")
        model.tie_weights()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        with PeakMemory([*model.parameters(), *model.buffers(), *grads]) as memory:
            hidden = policy.hidden_states(ids[:, :-1], use_cache=False)[:, prompt_tokens - 1 :].flatten(0, 1)
            # Statistics are computed in blocks of equal memory, so that two blocks show the peak.
            chunk = hidden[: 2 * BLOCK["cpu"][0]]
            stats = compute_token_stats(chunk, policy.head, ids.flatten()[: len(chunk)])
            stats.logprob.sum().backward()
    return memory.peak


class PeakMemory(TorchDispatchMode):
    """Count the memory that operations in the block hold.

    ``peak`` is the maximum, in bytes.
    """

    def __init__(self, held_before: list[Tensor]) -> None:
        """Exclude the memory of ``held_before``."""
        super().__init__()
        self.peak = self._held = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in held_before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the tensors that it returns."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self._held += size
            self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._held -= size
