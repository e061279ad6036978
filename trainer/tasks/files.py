"""Read prompts from JSONL and Parquet files.

Rows hold prompt and answer, or chats, or verl's schema unchanged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from entrace.analysis.importers.row_files import (
    BadRowError,
    MissingFieldError,
    Place,
    field_at,
    kind_of,
    name_some,
    question_of,
    read_rows,
    text_of,
)
from entrace.analysis.trace import InputError
from entrace.trainer.seeding import Stream, generator
from entrace.trainer.settings import validate_section
from entrace.trainer.tasks.config import FileParams, SourceConfig
from entrace.trainer.tasks.math_verifier import fault_of
from entrace.trainer.tasks.normalize import normalize_text
from entrace.trainer.tasks.prompt import Prompt, Verifier
from entrace.trainer.tasks.rows import NoAnswerError, UnreadableAnswerError
from entrace.trainer.tasks.source import Context
from entrace.trainer.tasks.verifiers import UserFunction

# Key of the answer in verl's schema.
VERL_ANSWER = "reward_model.ground_truth"

logger = logging.getLogger(__name__)


@dataclass
class RowCount:
    """Counts of a file's rows, of skipped rows, and of rows without an answer.

    A user's function judges rows without an answer.
    """

    rows: int = 0
    bad_rows: int = 0
    too_long: int = 0
    without_answer: int = 0


class FileSource:
    """A file of rows: some are held out, the rest is reshuffled every epoch.

    Rows of other files can be held out instead.

    Attributes:
        heldout: Held-out prompts, grouped by held-out file.
        counts: Rows of each file.
        num_training: Training prompts; 0 before ``training`` is called.
    """

    def __init__(self, config: SourceConfig, context: Context) -> None:
        """Read the files and choose the held-out prompts.

        Raises:
            InputError: a file is unreadable or holds too few rows, or a row is malformed and must not be skipped.
        """
        self._config, self._context = config, context
        self._params = validate_section(FileParams, config.params, f"{context.section}.params of {config.name}")
        self.counts: dict[str, RowCount] = {}
        self.num_training = 0
        self._rows = self._read(config.name)
        self.heldout: list[Prompt] = []
        for place, (benchmark, path) in enumerate(config.heldout_files.items()):
            self.heldout += self._choose(self._read(path, benchmark), path, benchmark, place)
        if not config.heldout_files:
            self.heldout = self._choose(self._rows, config.name)

    @property
    def prompts(self) -> list[Prompt]:
        """Return all prompts of the files, held-out ones first."""
        return [*self.heldout, *self._rows]

    def training(self, excluded: set[str]) -> Callable[[int], Prompt]:
        """Return training prompts by index, from 0, epoch after epoch.

        Normalized texts in ``excluded`` are left out.
        """
        rows = [row for row in self._rows if normalize_text(row.text) not in excluded]
        if not rows:
            raise InputError(
                f"{self._config.name}: no row is left to train on; {len(self._rows)} are held out: lower "
                f"{self._context.section}.num_heldout, or name another {self._context.section}.heldout_file"
            )
        self.num_training = len(rows)
        return Epochs(rows, self._context.seed, self._context.number)

    def _read(self, path: str, benchmark: str | None = None) -> list[Prompt]:
        count = self.counts[path] = RowCount()
        prompts: list[Prompt] = []
        faults: list[str] = []
        advice: dict[str, None] = {}
        for place, row in read_rows(Path(path)):
            count.rows += 1
            try:
                prompt = self._prompt(path, place, row, benchmark)
            except BadRowError as fault:
                count.bad_rows += 1
                faults.append(f"{place}: {fault}")
                advice[fault.advice] = None
                continue
            if self._context.is_too_long(prompt):
                count.too_long += 1
                faults.append(f"{place}: longer than task.max_prompt_tokens")
            else:
                prompts.append(prompt)
            count.without_answer += prompt.ground_truth is None
        named = name_some(faults, len(faults))
        if count.bad_rows and not self._context.skips_bad_rows:
            told = "; ".join(filter(None, ['fix them, or set task.on_bad_rows = "skip"', *advice]))
            raise InputError(f"{path}: {count.bad_rows} of {count.rows} rows are malformed ({named}); {told}")
        if not prompts:
            raise InputError(f"{path}: no usable row{f' ({named})' if named else ', the file is empty'}")
        if faults:
            logger.warning("entrace: %s: %d of %d rows left out (%s)", path, len(faults), count.rows, named)
        if self._params.answer and all(prompt.ground_truth is None for prompt in prompts):
            key = f"{self._context.section}.params.answer"
            logger.warning('entrace: %s: no row has an answer at "%s"; check %s', path, self._params.answer, key)
        return prompts

    def _prompt(self, path: str, place: Place, row: dict[str, Any] | BadRowError, benchmark: str | None) -> Prompt:
        if isinstance(row, BadRowError):
            raise row
        data_source = _value_at(row, self._params.data_source)
        if not isinstance(data_source, str | None):
            raise BadRowError(f'"{self._params.data_source}" is {kind_of(data_source)}, expected text')
        verifier = self._verifier(data_source or None, benchmark)
        answer = self._params.answer or (VERL_ANSWER if row.get("reward_model") else "answer")
        ground_truth = _ground_truth(row, answer, is_free=isinstance(verifier, UserFunction))
        if fault := fault_of(verifier, ground_truth):
            raise UnreadableAnswerError(f'"{answer}" is unreadable, {fault}')
        return Prompt(
            prompt_id=f"{self._context.prefix}train-{place.number:06d}",
            split="train",
            task=benchmark or data_source or self._context.label,
            question=question_of(field_at(row, self._params.prompt), self._params.prompt),
            ground_truth=ground_truth,
            difficulty=None,
            origin=f"{path}, {place}",
            entry=row,
            verifier=verifier,
        )

    def _verifier(self, data_source: str | None, benchmark: str | None) -> Verifier:
        """Return the verifier of the data source.

        Without one, the verifier is that of the named held-out file, else that of the source.
        """
        verifiers, label = self._context.verifiers, self._context.label
        if benchmark is None:
            return verifiers.of(data_source or label)
        of_benchmark = verifiers.of(benchmark, verifiers.of(label))
        return verifiers.of(data_source, of_benchmark) if data_source else of_benchmark

    def _choose(
        self, candidates: list[Prompt], path: str, benchmark: str | None = None, place: int = 0
    ) -> list[Prompt]:
        """Return held-out prompts with distinct texts, in file order.

        ``heldout_seed`` determines the draw.
        """
        distinct: dict[str, Prompt] = {}
        for prompt in candidates:
            distinct.setdefault(normalize_text(prompt.text), prompt)
        chosen, wanted = list(distinct.values()), self._config.heldout_limit
        if wanted is not None:
            if len(chosen) < wanted:
                key = f"{self._context.section}.num_heldout"
                whole = ", or remove it to evaluate the whole file" if path != self._config.name else ""
                raise InputError(
                    f"{path}: {len(chosen)} distinct prompts, fewer than {key} = {wanted}; lower it{whole}"
                )
            rng = generator(self._context.heldout_seed, Stream.SPLIT, self._context.number, *[place] * (place > 0))
            chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:wanted].tolist())]
        prefix = self._context.prefix
        split = f"heldout-{benchmark}" if benchmark else "heldout"
        ids = [f"{prefix}{split}{prompt.prompt_id.removeprefix(f'{prefix}train')}" for prompt in chosen]
        return [replace(prompt, split="heldout", prompt_id=i) for prompt, i in zip(chosen, ids, strict=True)]


class Epochs:
    """Rows by index, each once per epoch, in an order set by seed and epoch.

    No row of the last quarter of an epoch returns in the first half of the next. A step that draws at most a quarter
    of the rows therefore repeats none.
    """

    def __init__(self, rows: list[Prompt], seed: int, number: int) -> None:
        """Order ``rows``; ``number`` is that of the source."""
        self._rows, self._seed, self._number = rows, seed, number
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, index: int) -> Prompt:
        """Return the row of an index, from 0 at the start of the first epoch."""
        epoch, place = divmod(index, len(self._rows))
        if epoch not in self._orders:
            self._orders = {epoch: self._order(epoch)}
        return self._rows[self._orders[epoch][place]]

    def _order(self, epoch: int) -> np.ndarray:
        order, quarter = self._shuffle(epoch), len(self._rows) // 4
        if epoch == 0 or quarter == 0:
            return order
        # The last quarter keeps its shuffled order, or else an order would depend on all earlier epochs.
        head = order[:-quarter]
        was_last = np.isin(head, self._shuffle(epoch - 1)[-quarter:])
        return np.concatenate((head[~was_last], head[was_last], order[-quarter:]))

    def _shuffle(self, epoch: int) -> np.ndarray:
        return generator(self._seed, Stream.EPOCH, self._number, epoch).permutation(len(self._rows))


def _value_at(row: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None if the key is missing."""
    try:
        return field_at(row, key)
    except MissingFieldError:
        return None


def _ground_truth(row: Mapping[str, Any], key: str, is_free: bool) -> str | None:
    """Return text unchanged, numbers as text, and None for a missing answer.

    An answer is missing if the key is missing, or the value is null or blank. Only rows that a user's function judges
    (``is_free``) may lack the answer or hold other JSON.

    Raises:
        BadRowError: the answer is missing or has another type.
    """
    try:
        value = field_at(row, key)
    except MissingFieldError as error:
        if is_free:
            return None
        raise NoAnswerError(str(error)) from None
    if value is None or (isinstance(value, str) and not value.strip()):
        if is_free:
            return None
        raise NoAnswerError(f'"{key}" is null, expected text or a number' if value is None else f'"{key}" is empty')
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (is_free and isinstance(value, list | dict | bool)):
        return json.dumps(value, default=str)
    return text_of(value, f'"{key}"')
