"""Choose the steps and responses whose tokens a trace stores.

All other tables are complete. Tokens are stored on every k-th step, on the first and the last one, and on steps with
after-update values, which are useless without tokens. On these steps, a share of the responses is stored, each
completely. The choice is a function of seed, step, and rollout_id alone. The choice therefore leaves training
unchanged, is equal for resumed runs and any number of processes, and can be made later (``prune``). Smaller shares
choose subsets of larger ones.

Responses are chosen one by one, not by group: values vary more between prompts than within one, and no statistic needs
the tokens of a whole group. Values that depend on the group, such as advantage and perplexity, are in table
``rollouts``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from entrace.analysis.trace.errors import InputError

# Key of run.json.
TOKEN_SAMPLING = "token_sampling"
# Increment and multipliers of SplitMix64 (Steele et al., OOPSLA 2014).
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class TokenSampling:
    """The part of a run whose tokens are stored.

    Attributes:
        steps: Tokens are stored on every ``steps``-th step, and on the steps named in the module.
        responses: Share of the responses of these steps, in (0, 1].
    """

    steps: int = 1
    responses: float = 1.0

    @classmethod
    def of(cls, manifest: Mapping[str, Any], place: str = "run.json") -> TokenSampling:
        """Return the sampling that ``run.json`` records; everything without an entry.

        Errors name the file as ``place``.

        Raises:
            InputError: a value is out of range.
        """
        found = manifest.get(TOKEN_SAMPLING) or {}
        steps, responses = found.get("steps", 1), found.get("responses", 1.0)
        is_number = isinstance(steps, int) and isinstance(responses, int | float)
        if not (is_number and steps >= 1 and 0 < responses <= 1):
            raise InputError(
                f"{place}: {TOKEN_SAMPLING} is {reprlib.repr(found)}, expected steps of at least 1 and responses in "
                "(0, 1]"
            )
        return cls(steps, responses)

    def entry(self) -> dict[str, Any]:
        """Return the entry of ``run.json``; empty if all tokens are stored."""
        return {} if self == TokenSampling() else {TOKEN_SAMPLING: asdict(self)}

    def has_step(self, number: int, *, is_last: bool) -> bool:
        """Return whether the interval selects the ``number``-th step.

        The first and last steps are always selected. Steps with after-update values have tokens even if not selected.
        """
        return is_last or number == 1 or number % self.steps == 0

    def thinned(self, other: TokenSampling) -> TokenSampling:
        """Return the sampling that results if ``other`` is applied after this one."""
        return TokenSampling(math.lcm(self.steps, other.steps), min(self.responses, other.responses))

    def __str__(self) -> str:
        steps = f"one step in {self.steps}" if self.steps > 1 else "every step"
        return f"{100 * self.responses:.3g}% of the responses on {steps}"


def response_draws(seed: int, step: int | np.ndarray, rollout_ids: np.ndarray) -> np.ndarray:
    """Return a uniform number in [0, 1) per response.

    The tokens of a response are stored if its number is below the share.

    Args:
        seed: Seed of the run.
        step: Step of each response, or of all.
        rollout_ids: Ids of the responses, ``(n,)``.

    Returns:
        Draws, ``(n,)`` float64.
    """
    state = np.zeros(len(rollout_ids), np.uint64)
    for value in (seed, step, rollout_ids):
        state = _mix(state + np.asarray(value).astype(np.int64).astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """Return the next output of SplitMix64 for each state, modulo 2^64."""
    state = state + np.uint64(GAMMA)
    for shift, multiplier in MULTIPLIERS:
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(multiplier)
    return state ^ (state >> np.uint64(31))
