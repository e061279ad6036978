"""Check arguments of traced trainers, and the version of the traced library."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from entrace.analysis.trace.errors import InputError, nearest
from entrace.trainer.algorithm.plateau import PlateauDetector
from entrace.trainer.algorithm.shaping import ShapingConfig
from entrace.trainer.settings import validate_section

log = logging.getLogger("entrace")

# Tested versions of TRL: lower bound included, upper bound excluded.
TESTED = ((1, 14), (1, 17))
# Name of held-out prompts that have none.
HELDOUT = "heldout"
# Most responses that are evaluated again after an update, unless a number is given.
MAX_AFTER = 24


@dataclass(frozen=True)
class Arguments:
    """Hold the arguments that ``Traced`` adds to those of a trainer."""

    run_dir: Path
    shaping: ShapingConfig
    correct: str | float | None
    after_update_every: int
    after_update_responses: int | None
    flush_every: int
    arm: str | None

    def __post_init__(self) -> None:
        """Refuse numbers that are negative or not integers."""
        for name, lowest in (("after_update_every", 0), ("after_update_responses", 1), ("flush_every", 1)):
            value = getattr(self, name)
            if value is None and name == "after_update_responses":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise InputError(f"{name}: {value!r} is not an integer of at least {lowest}")

    def num_after(self, batch_size: int) -> int:
        """Return the number of responses per batch to capture after an update.

        The default is an eighth of the batch, between 1 and ``MAX_AFTER``. A smaller batch is captured whole.
        """
        return self.after_update_responses or min(MAX_AFTER, max(1, batch_size // 8))

    def detector(self, history: Iterable[tuple[float | None, float | None]]) -> PlateauDetector:
        """Return the plateau detector after past pairs of entropy and accuracy.

        Unknown values count as 0.
        """
        return PlateauDetector(
            self.shaping.plateau, [(entropy or 0.0, accuracy or 0.0) for entropy, accuracy in history]
        )


def check_version() -> None:
    """Warn once if the tests have not run against the installed version of TRL."""
    warn_if_untested("TRL", trl_version(), TESTED)


def warn_if_untested(name: str, found: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Warn once if version ``found`` is outside ``tested``.

    The lower bound is included, the upper bound excluded.
    """
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not tested[0] <= numbers < tested[1]:
        low, high = (".".join(map(str, version)) for version in tested)
        _warn_once(
            f"{name} {found} has not been tested with entrace, which was tested with {low} up to, not including, {high}"
        )


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def trl_version() -> str:
    """Return the version of the installed TRL."""
    return version("trl")


def shaping_config(shaping: Any) -> ShapingConfig:
    """Return the section of a config that the argument ``shaping`` stands for.

    Raises:
        InputError: an unknown method or parameter.
    """
    if isinstance(shaping, ShapingConfig):
        return shaping
    if shaping is None:
        return ShapingConfig()
    if isinstance(shaping, str):
        values: Mapping[str, Any] = {"method": shaping}
    elif isinstance(shaping, Mapping):
        values = shaping
    else:
        values = {"method": list(shaping)}
    return validate_section(ShapingConfig, values, "shaping")


def choose_correct(correct: str | float | None, names: Sequence[str]) -> tuple[str | float | None, str]:
    """Return the rule that decides correctness, as a value and in words.

    The value is the name of a reward function or a threshold on the total reward, or None if no rule applies.

    Raises:
        InputError: no such reward function, or the threshold is not a number.
    """
    if isinstance(correct, str):
        if correct not in names:
            raise InputError(f'correct: no reward function "{correct}"{nearest(correct, names)}')
        return correct, f"{correct} gives 1 or more"
    if correct is not None:
        if isinstance(correct, bool) or not isinstance(correct, int | float):
            raise InputError(f"correct: expected the name of a reward function or a number, found {correct!r}")
        return float(correct), f"the total reward is at least {correct:g}"
    if "accuracy_reward" in names or len(names) == 1:
        chosen = "accuracy_reward" if "accuracy_reward" in names else names[0]
        return chosen, f"{chosen} gives 1 or more"
    return None, f"none of {', '.join(names)} is named by the argument correct"
