"""Define numbered trials of any fault, and the four ways in which one can end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from .scene import Scene


class Outcome(StrEnum):
    """Name the ways in which a trial can end; the last two must not happen.

    Attributes:
        SURVIVED: The work continues, or the same command completes it, and every answer is right.
        REFUSED: One line says what is wrong, and nothing was lost.
        SILENT: An answer is wrong, and no line says so.
        LOST: Rows or files are missing, a command hangs, or it ends with a traceback.
    """

    SURVIVED = "survived"
    REFUSED = "refused"
    SILENT = "silent"
    LOST = "lost"


FAILED = (Outcome.SILENT, Outcome.LOST)


@dataclass(frozen=True)
class Trial:
    """Describe how one trial ended.

    Attributes:
        kind: Name of the fault.
        index: Number of the trial.
        outcome: How it ended.
        message: A line of the command, or what failed.
        detail: What was drawn.
        seconds: Duration.
        commit: Commit at which it was played, because a command that continues may do so with changed code.
    """

    kind: str
    index: int
    outcome: Outcome
    message: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    commit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as JSON stores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trial:
        """Return a trial that was stored as JSON."""
        return cls(**{**values, "outcome": Outcome(values["outcome"])})


class UnexpectedError(Exception):
    """Report what must not happen in a trial.

    Attributes:
        outcome: ``SILENT`` or ``LOST``.
    """

    def __init__(self, outcome: Outcome, message: str) -> None:
        """Store the outcome of the trial."""
        super().__init__(message)
        self.outcome = outcome


def require(condition: object, message: str, outcome: Outcome = Outcome.LOST) -> None:
    """Raise ``UnexpectedError`` unless the condition holds."""
    if not condition:
        raise UnexpectedError(outcome, message)


class Fault(ABC):
    """Cause one kind of fault.

    Attributes:
        name: Name of the kind.
        number: Trials of a complete run.
    """

    name: ClassVar[str]
    number: ClassVar[int]

    def __init__(self, scene: Scene) -> None:
        """Store where trials take place."""
        self.scene = scene

    @abstractmethod
    def attempt(self, index: int, rng: np.random.Generator) -> Trial:
        """Play a trial, whose random numbers all come from ``rng``."""

    def play(self, index: int) -> Trial:
        """Play a trial; an error of any kind makes it a failure."""
        rng = np.random.default_rng([self.scene.seed, crc32(self.name.encode()), index])
        started = time.perf_counter()
        try:
            trial = self.attempt(index, rng)
        except UnexpectedError as found:
            trial = Trial(self.name, index, found.outcome, str(found))
        except Exception as error:  # a reader that cannot cope is a finding
            trial = Trial(self.name, index, Outcome.LOST, f"{type(error).__name__}: {error}")
        return replace(trial, seconds=round(time.perf_counter() - started, 3))

    def survived(self, index: int, message: str = "", **detail: Any) -> Trial:
        """Return a trial in which nothing was lost."""
        return Trial(self.name, index, Outcome.SURVIVED, message, detail)

    def refused(self, index: int, message: str, **detail: Any) -> Trial:
        """Return a trial that ended with one line."""
        return Trial(self.name, index, Outcome.REFUSED, message, detail)
