"""The interface of sources of prompts, and what a source is told of the task that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from entrace.trainer.tasks.prompt import Prompt
from entrace.trainer.tasks.verifiers import Verifiers


@dataclass(frozen=True)
class Context:
    """The place of a source in its task, and what it shares with the others.

    Attributes:
        section: Key of its configuration, for messages.
        label: Name of its prompts' task, for rows that name no data source.
        prefix: Begins its prompt ids.
        number: From 0, among the sources.
        seed: Decides training prompts and their order.
        heldout_seed: Decides held-out prompts.
        verifiers: By data source.
        is_too_long: Prompts to leave out.
        skips_bad_rows: Leaves malformed rows out instead of stopping.
    """

    section: str
    label: str
    prefix: str
    number: int
    seed: int
    heldout_seed: int
    verifiers: Verifiers
    is_too_long: Callable[[Prompt], bool]
    skips_bad_rows: bool


class Source(Protocol):
    """Prompts of one origin, in two splits that share no normalized text (``tasks.normalize``)."""

    heldout: list[Prompt]

    @property
    def prompts(self) -> list[Prompt]:
        """Return the prompts that are known without sampler any, held-out ones first."""
        ...

    def training(self, excluded: set[str]) -> Callable[[int], Prompt]:
        """Return training prompts by index, from 0, without end, whose normalized texts are not ``excluded``."""
        ...
