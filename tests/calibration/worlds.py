"""What is true in a simulated run: the size of every effect, stage by stage and arm by arm."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

STEPS, BOUNDARY = 120, 36
GROUPS, GROUP = 32, 8
LENGTHS = np.arange(20, 29)


@dataclass(frozen=True)
class World:
    """Sizes of all effects. Pairs are values at the first step and at the end of the rising stage.

    Attributes:
        plateau_speed: Speed after the boundary relative to that before it.
        accuracy: Of sampled responses.
        negative_entropy: Mean token entropy of wrong responses, nats.
        positive_entropy: Of right ones.
        reasoning: Share of reasoning tokens.
        defects: Share of defective responses.
        ends: Entropy of the first and the last fifth of a response relative to its middle.
        wrong_surprisal: What wrong responses have more of mean surprisal, nats.
        reasoning_by_ppl: Share of reasoning tokens that the low-perplexity third has more than the high one.
        is_concentrated: Movement is concentrated on tokens of high entropy, more so at the end, and follows the sign of
            the advantage; else it is normally distributed and depends on nothing.
        impact_by_ppl: Accuracy lost by a replacement, high minus low perplexity third.
        impact_slope: Change of that loss from the first to the last token.
    """

    plateau_speed: float = 0.05
    accuracy: tuple[float, float] = (0.35, 0.65)
    negative_entropy: tuple[float, float] = (0.8, 0.5)
    positive_entropy: tuple[float, float] = (0.8, 0.5)
    reasoning: tuple[float, float] = (0.35, 0.35)
    defects: tuple[float, float] = (0.3, 0.3)
    ends: tuple[float, float] = (1.0, 1.0)
    wrong_surprisal: float = 0.0
    reasoning_by_ppl: float = 0.0
    is_concentrated: bool = False
    impact_by_ppl: float = 0.0
    impact_slope: float = 0.0


# A run with two stages, and nothing else of what is claimed.
NULL = World()
PLANTED = replace(
    NULL,
    negative_entropy=(1.0, 0.5),
    positive_entropy=(0.6, 0.5),
    reasoning=(0.30, 0.40),
    defects=(0.40, 0.20),
    ends=(1.4, 1.3),
    wrong_surprisal=0.05,
    reasoning_by_ppl=0.08,
    is_concentrated=True,
    impact_by_ppl=0.2,
    impact_slope=0.3,
)


@dataclass(frozen=True)
class MethodWorld:
    """What each arm adds to its reference: accuracy, relative length, share of formal tokens."""

    accuracy: float = 0.0
    length: float = 0.0
    formal: float = 0.0


NULL_METHODS = MethodWorld()
PLANTED_METHODS = MethodWorld(accuracy=0.15, length=0.2, formal=0.1)


def path(pair: tuple[float, float], world: World) -> np.ndarray:
    """Values of all steps, shape ``(STEPS,)``: a straight line to the boundary, then one of ``plateau_speed``."""
    step = np.arange(1, STEPS + 1)
    done = np.minimum(step - 1, BOUNDARY - 1) + world.plateau_speed * np.maximum(step - BOUNDARY, 0)
    return pair[0] + (pair[1] - pair[0]) * done / (BOUNDARY - 1)
