"""The configuration of one training run, as a tree of sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.sampling import TokenSampling
from entrace.trainer.algorithm.method import find_method
from entrace.trainer.algorithm.mini_batch import LossConfig
from entrace.trainer.algorithm.shaping import ShapingConfig, find_replacement
from entrace.trainer.resources import EMBEDDED, resolve_config
from entrace.trainer.settings import (
    BaseConfig,
    Natural,
    Positive,
    merge,
    parse_override,
    read_toml,
    validate_section,
)
from entrace.trainer.tasks.config import TaskConfig

FilterMetric = Literal["acc", "reward"]
WhenShort = Literal["fewer", "more", "error"]
Engine = Literal["native", "vllm"]
Schedule = Literal["constant", "linear", "cosine"]

# Keys of earlier versions, each with the value that describes the present behavior.
REMOVED_KEYS = {("record", "mantissa_bits"): 23}
# Values of earlier versions, each with the present name, or None if it was removed.
FORMER_VALUES = {("rollout", "engine", "cache"): "native", ("rollout", "engine", "continuous"): None}

# The keys that bound the memory of updating and of sampling.
UPDATE_MEMORY, SAMPLING_MEMORY = "optim.micro_batch_tokens", "rollout.cache_tokens"
VLLM_MEMORY = "rollout.vllm_memory"
# The keys that may change when a run is resumed, besides its number of steps.
CHANGEABLE_KEYS = (UPDATE_MEMORY, SAMPLING_MEMORY, VLLM_MEMORY, "record.log")


class LoraConfig(BaseConfig):
    """Low-rank adapters of linear layers (LoRA, arXiv 2106.09685).

    The rank is r, the scale is alpha / r, and ``target_modules`` are module names. There is no dropout, so that the
    policy being updated is the policy that was sampled from.
    """

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class PolicyConfig(BaseConfig):
    """The model to train, its arithmetic, and its prompt template.

    ``template`` replaces the tokenizer's chat template, for few-shot prompts and base models; ``{question}`` marks
    where the question goes.
    """

    path: str = EMBEDDED
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "packed", "sdpa", "eager"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    template: str | None = None

    @field_validator("template")
    @classmethod
    def _asks_something(cls, template: str | None) -> str | None:
        if template is not None and "{question}" not in template:
            raise ValueError("expected {question}, which marks where the question goes")
        return template


class RolloutConfig(BaseConfig):
    """Sampling of the responses of a step.

    Dynamic sampling drops groups whose ``filter_metric`` is uniform and draws up to ``max_refills`` more rounds. If
    groups are still missing, ``when_short`` chooses between an update from ``fewer`` groups, ``more`` rounds, and an
    ``error``. ``overlong_penalty`` is the largest deduction for length, on the scale of ``task.reward_values``. It
    defaults to half the distance between these values, the published strength (1 on a scale from -1 to 1).

    ``top_p`` and ``top_k`` truncate the distribution, both in sampling and in the update. ``stop`` lists texts that end
    a response, in evaluations too. ``cache_tokens`` bounds the tokens in the KV cache: prompts are sampled in parts
    that fit. ``engine = "vllm"`` samples with vLLM, which takes the share ``vllm_memory`` of the GPU's memory; recorded
    statistics are still the policy's.
    """

    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    max_response_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Positive | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    cache_tokens: Positive = 1 << 20
    engine: Engine = "native"
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    dynamic_sampling: bool = True
    filter_metric: FilterMetric = "acc"
    max_refills: Natural = 2
    when_short: WhenShort = "fewer"
    overlong_buffer_tokens: Natural = 0
    overlong_penalty: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _buffer_fits(self) -> RolloutConfig:
        if self.overlong_buffer_tokens > self.max_response_tokens:
            raise ValueError("overlong_buffer_tokens must not exceed max_response_tokens")
        return self


def sampling_memory(rollout: RolloutConfig) -> str:
    """Return the key that bounds the memory of sampling."""
    return SAMPLING_MEMORY if rollout.engine == "native" else VLLM_MEMORY


class OptimConfig(BaseConfig):
    """AdamW, its learning-rate schedule, and how a batch is split.

    The learning rate rises over ``warmup_steps``, starting at ``lr / warmup_steps``, or at 0 with
    ``warmup_from_zero``. It then stays constant or falls to 0 at ``schedule_steps`` (default: the run's ``steps``).
    Weight decay excludes norms and biases unless ``decay_all`` is set.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup_steps: Natural = 5
    warmup_from_zero: bool = False
    schedule: Schedule = "constant"
    schedule_steps: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_all: bool = False
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    mini_batches: Positive = 1
    epochs: Positive = 1
    micro_batch_tokens: Positive = 4096

    @model_validator(mode="after")
    def _has_a_schedule(self) -> OptimConfig:
        if self.schedule_steps is not None:
            if self.schedule == "constant":
                raise ValueError('schedule_steps has no effect with schedule = "constant"; set "linear" or "cosine"')
            if self.schedule_steps <= self.warmup_steps:
                raise ValueError("schedule_steps must be larger than warmup_steps")
        return self


class EvalConfig(BaseConfig):
    """Held-out evaluation at the start, every ``every`` steps, and at the end."""

    every: Positive = 20
    samples: Positive = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class RecordConfig(BaseConfig):
    """Intervals of recording, in steps: rows, after-update values, checkpoints.

    After-update values are captured for at most ``after_update_responses`` of the responses in an update;
    ``after_update_every = 0`` captures none. Tokens are stored on every ``token_steps``-th step, on the first and the
    last step, and on steps with after-update values, for the share ``token_responses`` of the responses. All other
    tables are complete. ``vocabulary_sums`` adds two sums over the vocabulary per stored token, which the exact law of
    entropy needs, by one more forward pass per step. ``reference`` adds log-probability and entropy of the base policy
    at each stored token, by a forward pass of a copy of it. ``log`` names dashboards that show steps and evaluations.
    """

    flush_every: Positive = 10
    after_update_every: Natural = 5
    after_update_responses: Positive = 24
    token_steps: Positive = 1
    token_responses: Annotated[float, Field(gt=0, le=1)] = 1.0
    vocabulary_sums: bool = False
    reference: bool = False
    checkpoint_every: Positive = 50
    lexicon: str | None = None
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def captures(self, step: int) -> bool:
        """Return whether after-update values are captured at a step."""
        return self.after_update_every > 0 and step % self.after_update_every == 0

    @property
    def token_sampling(self) -> TokenSampling:
        """Steps and responses whose tokens are stored."""
        return TokenSampling(self.token_steps, self.token_responses)

    @model_validator(mode="after")
    def _checkpoints_are_durable(self) -> RecordConfig:
        if self.checkpoint_every % self.flush_every:
            raise ValueError("checkpoint_every must be a multiple of flush_every")
        return self


class Config(BaseConfig):
    """One training run."""

    seed: Natural = 0
    steps: Positive = 120
    policy: PolicyConfig = PolicyConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    # Sections of a user's own methods are fields of a subclass.
    shaping: SerializeAsAny[ShapingConfig] = ShapingConfig()
    loss: SerializeAsAny[LossConfig] = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    record: RecordConfig = RecordConfig()

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_keys(cls, values: Any) -> Any:
        """Accept former keys and values that ask for the present behavior.

        A removed key must have the value that is now the only one. The old name of a value becomes the new name.
        """
        if not isinstance(values, Mapping):
            return values
        for (section, key, old), new in FORMER_VALUES.items():
            found = values.get(section)
            if isinstance(found, Mapping) and found.get(key) == old:
                if new is None:
                    raise ValueError(f'{section}.{key} = "{old}" is no longer supported; leave the key out')
                values = {**values, section: {**found, key: new}}
        for (section, key), only in REMOVED_KEYS.items():
            found = values.get(section)
            if isinstance(found, Mapping) and key in found:
                if found[key] != only:
                    raise ValueError(f"{section}.{key} = {found[key]!r} is no longer supported; leave the key out")
                values = {**values, section: {name: value for name, value in found.items() if name != key}}
        return values

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Config:
        if self.optim.mini_batches > self.rollout.prompts_per_step:
            raise ValueError("optim.mini_batches must not exceed rollout.prompts_per_step")
        return self

    @model_validator(mode="after")
    def _shaping_has_an_effect(self) -> Config:
        replaced_by = find_replacement(self.shaping)
        if replaced_by and not self.loss.normalize_std:
            raise ValueError(
                f"loss.normalize_std: has no effect with shaping.method {replaced_by}, which replaces the advantage; "
                "leave it out"
            )
        k, group_size = find_method("pass_at_k", "shaping").parameters(self.shaping)["k"], self.rollout.group_size
        if replaced_by == "pass_at_k" and k >= group_size:
            raise ValueError(
                f"shaping.pass_at_k.k: every advantage is 0 unless it is below rollout.group_size; found {k}, "
                f"and a group size of {group_size}"
            )
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value.

        Sections generated from methods are not classes that another process can import.
        """
        return _rebuild, (self.model_dump(mode="json"),)

    @property
    def overlong_penalty(self) -> float:
        """Largest deduction for length, on the scale of rewards."""
        wrong, right = self.task.reward_values
        return (right - wrong) / 2 if self.rollout.overlong_penalty is None else self.rollout.overlong_penalty


@checked
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file or a shipped config, and apply ``key.path=value`` overrides.

    A shipped config is named without a folder, such as ``tiny``.

    Raises:
        InputError: no such file, not TOML, an unknown key, a wrong type, or values that exclude each other.
    """
    values = read_toml(resolve_config(path))
    for override in overrides:
        values = merge(values, parse_override(override))
    return build_config(values, source=str(path))


def _rebuild(values: dict[str, Any]) -> Config:
    return build_config(values, source="config")


def build_config(values: Mapping[str, Any], source: str) -> Config:
    """Validate nested values; ``source`` begins the error message.

    Raises:
        InputError: an unknown key, a wrong type, or values that exclude each other.
    """
    return validate_section(Config, values, source)
