"""Number the groups of responses to one prompt, and name the prompts."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from hashlib import blake2b
from typing import Any

from entrace.analysis.importers.row_files import BadRowError


class Groups:
    """Number groups over all files in order of appearance.

    A recorded group holds one prompt. Groups that share a prompt at one step have different prompt ids.

    Attributes:
        count: Groups so far.
    """

    def __init__(self) -> None:
        """Start without groups."""
        self.count = 0
        self._groups: dict[tuple[int, int], tuple[int, str, int]] = {}
        self._prompts: dict[tuple[int, int], str] = {}
        self._repeats: Counter[tuple[int, int]] = Counter()

    def place(self, step: int, prompt: int, group: Any) -> tuple[int, str]:
        """Return the number of the group and the id of the prompt.

        Args:
            step: The step.
            prompt: Digest of the prompt.
            group: The recorded group; None for all responses to the prompt at the step.

        Raises:
            BadRowError: the group holds another prompt.
        """
        key = (step, prompt if group is None else digest(group))
        if key not in self._groups:
            repeat = (prompt, self._repeats[step, prompt])
            self._repeats[step, prompt] += 1
            name = self._prompts.setdefault(repeat, f"prompt-{len(self._prompts) + 1:06d}")
            self._groups[key] = (self.count, name, prompt)
            self.count += 1
        group_id, name, own = self._groups[key]
        if own != prompt:
            raise BadRowError(f"group {reprlib.repr(group)} holds another prompt at step {step}")
        return group_id, name


def digest(value: Any) -> int:
    """Return a number of 64 bits that identifies a value of JSON."""
    return int.from_bytes(blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")
