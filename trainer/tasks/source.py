"""What every source of prompts offers, and what it is told of the task that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trainer.tasks.prompt import Prompt
from trainer.tasks.verifiers import Verifiers


@dataclass(frozen=True)
class Context:
    """The place of a source in its task, and what it shares with the others.

    Attributes:
        label: What its prompts call their task, where rows do not say.
        prefix: Begins its prompt ids.
        number: From 0, among the sources.
        seed: Decides splits and orders.
        verifiers: By data source.
        is_too_long: Prompts to leave out.
        skips_bad_rows: Leaves malformed rows out instead of stopping.
    """

    label: str
    prefix: str
    number: int
    seed: int
    verifiers: Verifiers
    is_too_long: Callable[[Prompt], bool]
    skips_bad_rows: bool


class Source(Protocol):
    """Prompts of one origin, in two splits that share no text."""

    heldout: list[Prompt]

    def training(self, excluded: set[str]) -> Callable[[int], Prompt]:
        """Training prompts by index, from 0, whose texts are not in ``excluded``, without end."""
        ...
