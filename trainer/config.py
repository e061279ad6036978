"""The configuration of one training run: TOML, dotted overrides, and errors of one line that name the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from entrace.trainer.algorithm.objectives import LossConfig
from entrace.trainer.algorithm.shaping import ShapingConfig
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
Schedule = Literal["constant", "linear", "cosine"]

# Keys of earlier versions, and the value that stands for what is always done now.
REMOVED_KEYS = {("rollout", "engine"): "cache", ("record", "mantissa_bits"): 23}

# What decides how much memory updating, and sampling, takes.
UPDATE_MEMORY, SAMPLING_MEMORY = MEMORY_KEYS = ("optim.micro_batch_tokens", "rollout.cache_tokens")


class LoraConfig(BaseConfig):
    """Low-rank updates of linear maps (LoRA, arXiv 2106.09685): rank, scale alpha / r, and the modules by name.

    Without dropout: under it, the policy that is updated would not be the one that was sampled from.
    """

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class PolicyConfig(BaseConfig):
    """The model to train, how it computes, and how it is asked.

    ``template`` is the text of a prompt, ``{question}`` standing for its question, in place of the tokenizer's chat
    template: for few-shot prompts, and models that were never taught to chat.
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
            raise ValueError("{question} is missing, which stands for the question")
        return template


class RolloutConfig(BaseConfig):
    """Sampling of a step's responses.

    Dynamic sampling drops groups whose ``filter_metric`` is uniform, and draws up to ``max_refills`` more rounds.
    ``when_short`` says what follows if groups are still missing: an update from ``fewer`` groups, ``more`` rounds, or
    an ``error``. ``overlong_penalty`` is the largest deduction for length, on the scale of ``task.reward_values``; if
    not set, half the distance between these, the published strength (1 on a scale from -1 to 1).
    ``top_p`` and ``top_k`` cut the distribution, for sampling and in the update alike. ``stop`` holds texts that end a
    response once they are complete, in evaluations too. ``cache_tokens`` is how many tokens the caches of keys and
    values may hold at once: prompts are sampled in parts that fit, at least one prompt each.
    """

    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    max_response_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Positive | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    cache_tokens: Positive = 1 << 20
    dynamic_sampling: bool = True
    filter_metric: FilterMetric = "acc"
    max_refills: Natural = 2
    when_short: WhenShort = "fewer"
    overlong_buffer_tokens: Natural = 0
    overlong_penalty: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _buffer_fits(self) -> RolloutConfig:
        if self.overlong_buffer_tokens > self.max_response_tokens:
            raise ValueError("overlong_buffer_tokens is longer than max_response_tokens")
        return self


class OptimConfig(BaseConfig):
    """AdamW, its schedule, and how a step's batch is cut up.

    The learning rate rises over ``warmup_steps``, from ``lr / warmup_steps`` at the first step, or from 0 with
    ``warmup_from_zero``. It then stays, or falls to 0 at ``schedule_steps`` (the run's ``steps`` if not set). Weight
    decay spares norms and biases unless ``decay_all`` is set.
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
    """Held-out evaluation, before the first step, every ``every`` steps and after the last."""

    every: Positive = 20
    samples: Positive = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class RecordConfig(BaseConfig):
    """How often, in steps, buffered rows become Parquet files, after-update values are captured, a checkpoint is kept.

    ``after_update_every`` = 0 captures none; else ``after_update_responses`` of those in the update, at most, are
    captured.
    """

    flush_every: Positive = 10
    after_update_every: Natural = 5
    after_update_responses: Positive = 24
    checkpoint_every: Positive = 50
    lexicon: str | None = None

    def captures(self, step: int) -> bool:
        """Whether after-update values are captured at this step."""
        return self.after_update_every > 0 and step % self.after_update_every == 0

    @model_validator(mode="after")
    def _checkpoints_are_durable(self) -> RecordConfig:
        if self.checkpoint_every % self.flush_every:
            raise ValueError("checkpoint_every is no multiple of flush_every")
        return self


class Config(BaseConfig):
    """One training run."""

    seed: Natural = 0
    steps: Positive = 120
    policy: PolicyConfig = PolicyConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    shaping: ShapingConfig = ShapingConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    record: RecordConfig = RecordConfig()

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_keys(cls, values: Any) -> Any:
        """Ignore keys that no longer exist where they ask for what is always done now."""
        if not isinstance(values, Mapping):
            return values
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
            raise ValueError("optim.mini_batches is larger than rollout.prompts_per_step")
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value: sections generated from methods are not classes that another process can import."""
        return _rebuild, (self.model_dump(mode="json"),)

    @property
    def overlong_penalty(self) -> float:
        """Largest deduction for length, on the scale of rewards."""
        wrong, right = self.task.reward_values
        return (right - wrong) / 2 if self.rollout.overlong_penalty is None else self.rollout.overlong_penalty


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, or a shipped config by name, and applies ``key.path=value`` overrides.

    Raises:
        InputError: no such file, not TOML, an unknown key, a wrong type, or values that exclude each other.
    """
    values = read_toml(resolve_config(path))
    for override in overrides:
        values = merge(values, parse_override(override))
    return build_config(values, source=path)


def _rebuild(values: dict[str, Any]) -> Config:
    return Config.model_validate(values)


def build_config(values: Mapping[str, Any], source: str) -> Config:
    """Validates nested values; ``source`` begins the error message."""
    return validate_section(Config, values, source)
