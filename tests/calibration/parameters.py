"""Define parameters of simulated runs and ablations, and time courses of means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LENGTHS = np.arange(20, 29)
BOUNDARY_SHARE = 0.3


@dataclass(frozen=True)
class World:
    """Hold the parameters of a simulated run.

    A pair is the value before and after the change of its course.

    Attributes:
        runs: Number of runs, judged together as seeds of the baseline arm.
        steps: Training steps.
        groups: Prompts per step.
        group: Responses per prompt.
        pool: Prompts that steps draw from; None for new prompts at every step.
        capture_every: Steps between captures of after-update values.
        has_responses: Record responses; otherwise only the metrics of each step.
        has_tokens: Record tokens.
        has_interventions: Record interventions on the last ten steps.
        course: Name in ``COURSES`` of the time course of all pairs.
        accuracy_course: Time course of accuracy, if it differs.
        plateau_speed: Speed of the second of two lines relative to the first.
        accuracy: Accuracy of sampled responses.
        negative_entropy: Mean token entropy of incorrect responses, nats.
        positive_entropy: Mean token entropy of correct responses, nats.
        reasoning: Share of reasoning tokens.
        defects: Share of defective responses.
        difficulty: Standard deviation over prompts of the logit of accuracy.
        hard_entropy: Increase of log entropy per standard deviation of difficulty.
        drift: Size of the policy's states relative to ``simulate.STATE_SCALES``.
        rho: Autocorrelation of the states between steps; their variance does not depend on it.
        growth: Relative growth of response length over training.
        wrong_length: Relative excess length of incorrect responses.
        length_entropy: Exponent of the power law of entropy in length.
        position_entropy: Increase of log entropy per 24 tokens of position.
        position_reasoning: Increase of the share of reasoning tokens per 24 tokens of position.
        ends: Entropy of the first and last fifth of a response relative to its middle.
        reasoning_by_ppl: Share of reasoning tokens, low- minus high-perplexity third of a group.
        is_heavy_tailed: Noise of tokens, responses, and logit changes follows Student's t with 3 degrees of freedom.
        update: none, float32, bf16 (rounding only), random, learned, or even.
        update_size: Standard deviation of random logit changes.
        push: Logit change along the sign of the advantage, relative to the size of the update.
        law: Logit change of random updates per unit of the advantage, relative to the size of the update; then the
            discriminator formula is true to first order.
        end_movement: Factor of the movement of tokens in the last fifth.
        end_gradient: Factor of the gradient norm of tokens in the last fifth.
        impact_by_ppl: Accuracy lost by a replacement, high- minus low-perplexity third.
        impact_slope: Change of this loss from the first to the last token.
    """

    runs: int = 1
    steps: int = 100
    groups: int = 24
    group: int = 8
    pool: int | None = None
    capture_every: int = 5
    has_responses: bool = True
    has_tokens: bool = False
    has_interventions: bool = False
    course: str = "two lines"
    accuracy_course: str = ""
    plateau_speed: float = 0.05
    accuracy: tuple[float, float] = (0.4, 0.8)
    negative_entropy: tuple[float, float] = (0.6, 0.25)
    positive_entropy: tuple[float, float] = (0.6, 0.25)
    reasoning: tuple[float, float] = (0.35, 0.35)
    defects: tuple[float, float] = (0.3, 0.3)
    difficulty: float = 0.7
    hard_entropy: float = 0.0
    drift: float = 1.0
    rho: float = 0.5
    growth: float = 0.0
    wrong_length: float = 0.0
    length_entropy: float = 0.0
    position_entropy: float = 0.0
    position_reasoning: float = 0.0
    ends: tuple[float, float] = (1.0, 1.0)
    reasoning_by_ppl: float = 0.0
    is_heavy_tailed: bool = False
    update: str = "random"
    update_size: float = 0.3
    push: float = 0.0
    law: float = 0.0
    end_movement: float = 1.0
    end_gradient: float = 1.0
    impact_by_ppl: float = 0.0
    impact_slope: float = 0.0

    @property
    def boundary(self) -> int:
        """Return the last step of the rising stage if the course has two lines, or 0."""
        return round(BOUNDARY_SHARE * self.steps) if self.course == "two lines" else 0


@dataclass(frozen=True)
class MethodWorld:
    """Hold the parameters of a simulated ablation.

    Gains are those of arms ppl and position over their reference.

    Attributes:
        accuracy: Gain in accuracy on every benchmark.
        length: Relative gain in length.
        formal: Gain in the share of formal tokens.
        seeds: Seeds per arm.
        spread: Factor of the standard deviation over seeds of arm ppl.
        last_steps: Last evaluation of each benchmark.
    """

    accuracy: float = 0.0
    length: float = 0.0
    formal: float = 0.0
    seeds: int = 5
    spread: float = 1.0
    last_steps: tuple[int, ...] = (10,)


@dataclass(frozen=True)
class UpdateWorld:
    """Hold the parameters of a simulated run whose updates change entropy.

    Its evaluations show the change.

    Attributes:
        runs: Number of runs, judged together as seeds of the baseline arm.
        steps: Training steps.
        eval_every: Steps between evaluations.
        prompts: Prompts per step.
        group: Responses per prompt.
        update: none; random; sharpen (all logits grow, whatever was sampled); sharpen by size (in proportion to the
            mean absolute advantage); gradient; or against (the opposite of the gradient).
        rate: Learning rate at the first step.
        decay: Time constants by which the learning rate decays over the run.
        noise: Standard deviation of random logit changes beside the gradient, per unit of the learning rate.
        eval_noise: Standard deviation of the log entropy of a held-out response at each evaluation.
    """

    runs: int = 1
    steps: int = 120
    eval_every: int = 1
    prompts: int = 12
    group: int = 4
    update: str = "gradient"
    rate: float = 1.0
    decay: float = 0.0
    noise: float = 0.0
    eval_noise: float = 0.02


def _exponential(time_constants: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: np.expm1(-time_constants * t) / np.expm1(-time_constants)


def _sigmoid(t: np.ndarray) -> np.ndarray:
    values = 1 / (1 + np.exp(-10 * (t - 0.5)))
    return (values - values[0]) / (values[-1] - values[0])


# Completed share of the change at ``t``, the share of training. "two lines" depends on the world; see ``progress``.
COURSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flat": np.zeros_like,
    "linear": lambda t: t,
    "exponential, 1 time constant": _exponential(1),
    "exponential, 2 time constants": _exponential(2),
    "exponential, 3 time constants": _exponential(3),
    "exponential, 4 time constants": _exponential(4),
    "logarithm": lambda t: np.log1p(20 * t) / np.log1p(20),
    "sigmoid": _sigmoid,
    "there and back": lambda t: 4 * t * (1 - t),
    "slow then fast": lambda t: 0.15 * t + 0.85 * np.maximum(t - 0.6, 0) / 0.4,
    "early": lambda t: np.minimum(t / 0.35, 1),
    "late": lambda t: np.maximum(t - 0.65, 0) / 0.35,
}


def progress(world: World, course: str = "") -> np.ndarray:
    """Return the completed share of the change at each step, shape ``(steps,)``."""
    course = course or world.course
    if course != "two lines":
        return COURSES[course](np.linspace(0, 1, world.steps))
    i, rising = np.arange(world.steps), world.boundary - 1
    return (np.minimum(i, rising) + world.plateau_speed * np.maximum(i - rising, 0)) / rising


def curve(pair: tuple[float, float], world: World, course: str = "") -> np.ndarray:
    """Return the value of a pair at each step, shape ``(steps,)``."""
    return pair[0] + (pair[1] - pair[0]) * progress(world, course)
