"""The configuration of one training run: TOML, dotted overrides, and errors of one line that name the key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from analysis.trace import InputError, nearest, reason_of
from trainer.resources import EMBEDDED, resolve_config
from trainer.section import Fraction, Natural, Positive, Section
from trainer.task_config import TaskConfig

SHAPING_NAMES = (
    "ppl",
    "position",
    "entropy_advantage",
    "reweighting",
    "psr",
    "nsr",
    "weighted_reinforce",
    "ppl_high",
    "ppl_permuted",
    "position_reversed",
    "released_noop",
)
LossMethod = Literal["grpo", "entropy_mask", "clip_cov", "kl_cov", "low_ppl_only", "high_ppl_only"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Denominator = Literal["selected", "all"]
KLEstimator = Literal["k1", "k2", "k3"]
FilterMetric = Literal["acc", "reward"]
WhenShort = Literal["fewer", "more", "error"]
Schedule = Literal["constant", "linear", "cosine"]
Engine = Literal["cache", "continuous"]


def _check_composition(method: str) -> str:
    for part in method.split("+"):
        if part not in SHAPING_NAMES:
            raise ValueError(f'"{part}" is no shaping method{nearest(part, SHAPING_NAMES)}')
    return method


def _check_shaping(method: str) -> str:
    return method if method in ("none", "scale_matched") else _check_composition(method)


Composition = Annotated[str, AfterValidator(_check_composition)]
ShapingMethod = Annotated[str, AfterValidator(_check_shaping)]

# What decides how much memory updating, and sampling, takes.
UPDATE_MEMORY, SAMPLING_MEMORY = MEMORY_KEYS = ("optim.micro_batch_tokens", "rollout.cache_tokens")

# pydantic puts the branch of a union that was tried into the path of the error.
UNION_BRANCH = re.compile(r"constrained-|literal\[")

AnySection = TypeVar("AnySection", bound=Section)


class LoraConfig(Section):
    """Low-rank updates of linear maps (LoRA, arXiv 2106.09685): rank, scale alpha / r, and the modules by name.

    Without dropout: under it, the policy that is updated would not be the one that was sampled from.
    """

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class PolicyConfig(Section):
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


class RolloutConfig(Section):
    """Sampling of a step's responses.

    Dynamic sampling drops groups whose ``filter_metric`` is uniform, and draws up to ``max_refills`` more rounds.
    ``when_short`` says what follows if groups are still missing: an update from ``fewer`` groups, ``more`` rounds, or
    an ``error``. ``overlong_penalty`` is the largest deduction for length, on the scale of ``task.reward_values``; if
    not set, half the distance between these, the published strength (1 on a scale from -1 to 1).
    ``top_p`` and ``top_k`` cut the distribution, for sampling and in the update alike. ``stop`` holds texts that end a
    response once they are complete, in evaluations too. ``cache_tokens`` is how many tokens the caches of keys and
    values may hold at once: prompts are sampled in parts that fit, at least one prompt each. ``engine`` samples, in
    evaluations too: ``trainer.rollout.sample_at`` or ``trainer.continuous.sample_at``.
    """

    prompts_per_step: Positive = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    max_response_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Positive | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    cache_tokens: Positive = 1 << 20
    engine: Engine = "cache"
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


class Window(Section):
    """Steps at which a shaping method is on, first and last included; ``plateau`` is the step it is detected at."""

    start_step: Positive | Literal["plateau"] = 1
    end_step: Positive | None = None

    @model_validator(mode="after")
    def _is_a_window(self) -> Window:
        if self.end_step and isinstance(self.start_step, int) and self.end_step < self.start_step:
            raise ValueError("end_step comes before start_step")
        return self


class PplConfig(Window):
    """Parameters of PPL shaping; see ``trainer.shaping.ppl``."""

    alpha: float = 0.01
    clip: tuple[float, float] = (0.8, 1.2)


class PositionConfig(Window):
    """Parameters of position shaping; see ``trainer.shaping.position``."""

    start_step: Positive | Literal["plateau"] = "plateau"
    gamma: Annotated[float, Field(ge=0)] = 0.1
    slope: float = 15.0
    cap: Fraction = 0.5


class EntropyAdvantageConfig(Window):
    """Parameters of the entropy advantage; see ``trainer.shaping.entropy_advantage``."""

    alpha: Annotated[float, Field(ge=0)] = 0.4
    kappa: Annotated[float, Field(gt=1)] = 2.0


class ReweightingConfig(Window):
    """Parameter of advantage reweighting; see ``trainer.shaping.reweighting``."""

    alpha: Fraction = 0.2


class WeightedReinforceConfig(Window):
    """Parameter of weighted REINFORCE; see ``trainer.shaping.weighted_reinforce``."""

    positive_weight: Annotated[float, Field(ge=0)] = 0.1


class ScaleMatchedConfig(Section):
    """The method, or methods joined by ``+``, that ``scale_matched`` takes its size and windows from."""

    mirrors: Composition = "ppl"


class PlateauConfig(Section):
    """When the plateau counts as reached; see ``trainer.plateau.PlateauDetector``."""

    window_steps: Annotated[int, Field(ge=2)] = 10
    tolerance: Fraction = 0.1


class ShapingConfig(Section):
    """Advantage shaping: the method, the parameters of each, and the plateau that windows may start at.

    ``method`` is none, scale_matched, or others joined by ``+``, applied in that order.
    """

    method: ShapingMethod = "none"
    ppl: PplConfig = PplConfig()
    position: PositionConfig = PositionConfig()
    entropy_advantage: EntropyAdvantageConfig = EntropyAdvantageConfig()
    reweighting: ReweightingConfig = ReweightingConfig()
    weighted_reinforce: WeightedReinforceConfig = WeightedReinforceConfig()
    scale_matched: ScaleMatchedConfig = ScaleMatchedConfig()
    plateau: PlateauConfig = PlateauConfig()


class EntropyMaskConfig(Section):
    """Parameters of ``trainer.objectives.entropy_mask``."""

    top_frac: Fraction = 0.2
    denominator: Denominator = "selected"


class ClipCovConfig(Section):
    """Parameters of ``trainer.objectives.clip_cov``."""

    frac: Fraction = 2e-4
    low: float = 1.0
    high: float = 5.0


class KLCovConfig(Section):
    """Parameters of ``trainer.objectives.kl_cov``."""

    frac: Fraction = 2e-3
    coef: Annotated[float, Field(ge=0)] = 1.0


class PplOnlyConfig(Section):
    """Parameter of ``trainer.objectives.low_ppl_only`` and ``high_ppl_only``."""

    frac: Annotated[float, Field(gt=0, le=1)] = 0.5


class LossConfig(Section):
    """Clipped policy loss: its method, ratio and denominator; and the optional KL and entropy terms.

    ``dual_clip`` caps the ratio of tokens with a negative advantage (verl's ``clip_ratio_c``, TRL's ``delta``).
    ``mask_truncated`` leaves responses that reached the length limit out of the loss; their rewards still enter the
    mean and standard deviation of their group. ``kl_clamp`` bounds the KL estimate as verl's ``low_var_kl`` does.
    """

    method: LossMethod = "grpo"
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Aggregation = "token_mean"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    mask_truncated: bool = False
    normalize_std: bool = True
    entropy_mask: EntropyMaskConfig = EntropyMaskConfig()
    clip_cov: ClipCovConfig = ClipCovConfig()
    kl_cov: KLCovConfig = KLCovConfig()
    ppl_only: PplOnlyConfig = PplOnlyConfig()
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_clamp: bool = False
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0


class OptimConfig(Section):
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


class EvalConfig(Section):
    """Held-out evaluation, before the first step, every ``every`` steps and after the last."""

    every: Positive = 20
    samples: Positive = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class RecordConfig(Section):
    """How often, in steps, buffered rows become Parquet files, after-update values are captured, a checkpoint is kept.

    ``after_update_every`` = 0 captures none; else ``after_update_responses`` of those in the update, at most, are
    captured. ``mantissa_bits`` is to what measured columns of tokens are rounded.
    """

    flush_every: Positive = 10
    after_update_every: Natural = 5
    after_update_responses: Positive = 24
    checkpoint_every: Positive = 50
    lexicon: str | None = None
    mantissa_bits: Annotated[int, Field(ge=1, le=23)] = 23

    def captures(self, step: int) -> bool:
        """Whether after-update values are captured at this step."""
        return self.after_update_every > 0 and step % self.after_update_every == 0

    @model_validator(mode="after")
    def _checkpoints_are_durable(self) -> RecordConfig:
        if self.checkpoint_every % self.flush_every:
            raise ValueError("checkpoint_every is no multiple of flush_every")
        return self


class Config(Section):
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

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Config:
        if self.optim.mini_batches > self.rollout.prompts_per_step:
            raise ValueError("optim.mini_batches is larger than rollout.prompts_per_step")
        return self

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


def build_config(values: Mapping[str, Any], source: str) -> Config:
    """Validates nested values; ``source`` begins the error message."""
    return validate_section(Config, values, source)


def validate_section(model: type[AnySection], values: Mapping[str, Any], source: str) -> AnySection:
    """Builds ``model`` from nested values, turning the first validation error into one ``InputError`` line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_one_line(model, error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parses a TOML file.

    Raises:
        InputError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``; the value is TOML, or else a string."""
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f'override "{text}": expected key.path=value')
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    except (ValueError, RecursionError) as error:
        raise InputError(f'override "{text}": {error}') from None
    return nest(key.strip(), parsed)


def nest(key: str, value: Any) -> dict[str, Any]:
    """``a.b`` and a value as ``{"a": {"b": value}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings united; where both have a value, that of ``change``. An empty mapping clears."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping) and value
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _one_line(model: type[Section], error: ValidationError) -> str:
    # A misspelt key is also a missing one; the spelling is what helps.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"] if not UNION_BRANCH.match(str(part))]
    key = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f'unknown key "{key}"{nearest(path[-1], _keys_at(model, path[:-1]))}'
    if first["type"] == "missing":
        return f'key "{key}" is missing'
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if first["type"] == "literal_error":
        options = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
        return f'{key} = "{first["input"]}" is not valid{nearest(str(first["input"]), options)}'
    branches = [e["msg"] for e in error.errors() if e["loc"][: len(path)] == first["loc"][: len(path)]]
    expected = " or ".join(branches).replace("Input should be ", "expected ", 1).replace("Input should be ", "")
    return f"{key}: {expected}, found {first['input']!r}"


def _keys_at(model: type[Section], path: list[str]) -> list[str]:
    for part in path:
        # The name of an entry, such as that of a source in task.mix, is no field.
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, Section))
    return list(model.model_fields)
