"""Prompts from JSONL and Parquet files: rows of prompt and answer, of chats, or of verl's schema as they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.trace import InputError
from trainer.config import validate_section
from trainer.seeding import Stream, generator
from trainer.task_config import FileParams, SourceConfig
from trainer.tasks.prompt import Prompt
from trainer.tasks.rows import BadRowError, Place, field_at, kind_of, name_some, question_of, read_rows, text_of
from trainer.tasks.source import Context
from trainer.tasks.verifiers import UserFunction

# Where verl's schema keeps the answer.
VERL_ANSWER = "reward_model.ground_truth"

logger = logging.getLogger(__name__)


@dataclass
class RowCount:
    """Rows of a file, and those of them that were left out."""

    rows: int = 0
    bad_rows: int = 0
    too_long: int = 0


class FileSource:
    """Rows of a file: some, or those of another file, are held out; the rest is shuffled anew for every epoch."""

    def __init__(self, config: SourceConfig, context: Context) -> None:
        """Reads the files and chooses the held-out prompts.

        Raises:
            InputError: a file that cannot be read or holds too few rows, or a malformed row that shall not be skipped.
        """
        self._config, self._context = config, context
        self._params = validate_section(FileParams, config.params, f"task.params of {config.name}")
        self.counts: dict[str, RowCount] = {}
        self._rows = self._read(config.name)
        candidates = self._read(config.heldout_file) if config.heldout_file else self._rows
        self.heldout = self._choose(candidates, config.heldout_file or config.name)

    def training(self, excluded: set[str]) -> Callable[[int], Prompt]:
        """Training prompts by index, from 0, epoch after epoch, whose texts are not in ``excluded``."""
        rows = [row for row in self._rows if row.text not in excluded]
        if not rows:
            raise InputError(
                f"{self._config.name}: no row is left to train on, {len(self._rows)} are held out; lower "
                "task.num_heldout, or name a task.heldout_file"
            )
        return Epochs(rows, self._context.seed, self._context.number)

    def _read(self, path: str) -> list[Prompt]:
        count = self.counts.setdefault(path, RowCount())
        prompts, faults = [], []
        for place, row in read_rows(Path(path)):
            count.rows += 1
            try:
                prompt = self._prompt(path, place, row)
            except BadRowError as fault:
                count.bad_rows += 1
                faults.append(f"{place}: {fault}")
                continue
            if self._context.is_too_long(prompt):
                count.too_long += 1
                faults.append(f"{place}: longer than task.max_prompt_tokens")
            else:
                prompts.append(prompt)
        named = name_some(faults, len(faults))
        if count.bad_rows and not self._context.skips_bad_rows:
            raise InputError(
                f"{path}: {count.bad_rows} of {count.rows} rows are malformed ({named}); mend them, or set "
                'task.on_bad_rows = "skip"'
            )
        if not prompts:
            raise InputError(f"{path}: no usable row{f' ({named})' if named else ', the file is empty'}")
        if faults:
            logger.warning("entrace: %s: %d of %d rows left out (%s)", path, len(faults), count.rows, named)
        return prompts

    def _prompt(self, path: str, place: Place, row: dict[str, Any] | BadRowError) -> Prompt:
        if isinstance(row, BadRowError):
            raise row
        task = row.get(self._params.data_source) or self._context.label
        if not isinstance(task, str):
            raise BadRowError(f'"{self._params.data_source}" is {kind_of(task)}, expected text')
        verifier = self._context.verifiers.of(task)
        answer = self._params.answer or (VERL_ANSWER if row.get("reward_model") else "answer")
        return Prompt(
            prompt_id=f"{self._context.prefix}train-{place.number:06d}",
            split="train",
            task=task,
            question=question_of(field_at(row, self._params.prompt), self._params.prompt),
            ground_truth=_ground_truth(field_at(row, answer), answer, is_free=isinstance(verifier, UserFunction)),
            difficulty=None,
            origin=f"{path}, {place}",
            entry=row,
            verifier=verifier,
        )

    def _choose(self, candidates: list[Prompt], path: str) -> list[Prompt]:
        """The held-out prompts, of distinct texts, drawn by seed, in the order of the file."""
        distinct = list({prompt.text: prompt for prompt in reversed(candidates)}.values())[::-1]
        wanted = self._config.num_heldout
        if len(distinct) < wanted:
            raise InputError(f"{path}: {len(distinct)} distinct prompts, fewer than task.num_heldout = {wanted}")
        rng = generator(self._context.seed, Stream.SPLIT, self._context.number)
        chosen = [distinct[i] for i in sorted(rng.permutation(len(distinct))[:wanted].tolist())]
        prefix = self._context.prefix
        ids = [f"{prefix}heldout{prompt.prompt_id.removeprefix(f'{prefix}train')}" for prompt in chosen]
        return [replace(prompt, split="heldout", prompt_id=i) for prompt, i in zip(chosen, ids, strict=True)]


class Epochs:
    """Rows by index, each once an epoch, in an order that depends on the seed and the epoch alone.

    None of the last quarter of an epoch comes back in the first half of the next, so that a step that draws no more
    than a quarter of the rows meets none twice.
    """

    def __init__(self, rows: list[Prompt], seed: int, number: int) -> None:
        """``number`` is that of the source."""
        self._rows, self._seed, self._number = rows, seed, number
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, index: int) -> Prompt:
        """The row of that index, from 0 at the first epoch's beginning."""
        epoch, place = divmod(index, len(self._rows))
        if epoch not in self._orders:
            self._orders = {epoch: self._order(epoch)}
        return self._rows[self._orders[epoch][place]]

    def _order(self, epoch: int) -> np.ndarray:
        order, quarter = self._shuffle(epoch), len(self._rows) // 4
        if epoch == 0 or quarter == 0:
            return order
        # The last quarter stays as it was shuffled: else an order would depend on those of all epochs before it.
        head = order[:-quarter]
        was_last = np.isin(head, self._shuffle(epoch - 1)[-quarter:])
        return np.concatenate((head[~was_last], head[was_last], order[-quarter:]))

    def _shuffle(self, epoch: int) -> np.ndarray:
        return generator(self._seed, Stream.EPOCH, self._number, epoch).permutation(len(self._rows))


def _ground_truth(value: Any, key: str, is_free: bool) -> str:
    """Text as it is, numbers as text; lists and objects, as JSON, only for those who read the row themselves."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if is_number or (is_free and isinstance(value, list | dict)):
        return json.dumps(value, default=str)
    return text_of(value, f'"{key}"')
