"""Define the interface of prompt sources, and the context that a task gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from entrace.trainer.tasks.prompt import Prompt
from entrace.trainer.tasks.verifiers import Verifiers


@dataclass(frozen=True)
class Context:
    """Position of a source in its task, and settings that all sources share.

    Attributes:
        section: Key of the source's configuration, for messages.
        label: Task name of its prompts, for rows without a data source.
        prefix: Prefix of its prompt ids.
        number: Index among the sources, from 0.
        seed: Determines training prompts and their order.
        heldout_seed: Determines held-out prompts.
        verifiers: Verifier of each data source.
        is_too_long: Returns whether to skip a prompt.
        skips_bad_rows: Whether to skip malformed rows instead of raising.
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
    """Prompts of one origin, in two splits without a common text.

    Texts are compared as in ``tasks.normalize``.
    """

    heldout: list[Prompt]

    @property
    def prompts(self) -> list[Prompt]:
        """Return the prompts known before training draws any, held-out ones first."""
        ...

    def training(self, excluded: set[str]) -> Callable[[int], Prompt]:
        """Return an endless sequence of training prompts, by index from 0.

        Their normalized texts are not ``excluded``.
        """
        ...
