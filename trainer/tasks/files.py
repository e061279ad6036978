"""Prompts from JSONL and Parquet files: rows of prompt and answer, of chats, or of verl's schema as they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.trace import InputError, nearest
from trainer.config import validate_section
from trainer.seeding import Stream, generator
from trainer.task_config import FileParams, SourceConfig
from trainer.tasks.prompt import Prompt, Question
from trainer.tasks.source import Context
from trainer.tasks.verifiers import UserFunction

NUM_NAMED = 5
# Where verl's schema keeps the answer.
VERL_ANSWER = "reward_model.ground_truth"

logger = logging.getLogger(__name__)


class BadRowError(ValueError):
    """What is wrong with one row."""


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
        named = "; ".join(faults[:NUM_NAMED]) + ("; ..." if len(faults) > NUM_NAMED else "")
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
            raise BadRowError(f'"{self._params.data_source}" is {_kind(task)}, expected text')
        verifier = self._context.verifiers.of(task)
        answer = self._params.answer or (VERL_ANSWER if row.get("reward_model") else "answer")
        return Prompt(
            prompt_id=f"{self._context.prefix}train-{place.number:06d}",
            split="train",
            task=task,
            question=_question(_field(row, self._params.prompt), self._params.prompt),
            ground_truth=_ground_truth(_field(row, answer), answer, is_free=isinstance(verifier, UserFunction)),
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


@dataclass(frozen=True)
class Place:
    """Where in its file a row stands, from 1."""

    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


def read_rows(path: Path) -> Iterator[tuple[Place, dict[str, Any] | BadRowError]]:
    """Rows of a JSONL or Parquet file with their places; of what is no row, what is wrong with it.

    Raises:
        InputError: no such file, or a damaged one.
    """
    is_parquet = path.suffix.lower() == ".parquet"
    unit, rows = ("row", _read_parquet(path)) if is_parquet else ("line", _read_jsonl(path))
    try:
        for number, row in rows:
            yield Place(unit, number), row
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except json.JSONDecodeError as error:
        return BadRowError(f"not JSON, {error.msg.lower()} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not JSON, {error}")
    return row if isinstance(row, dict) else BadRowError(f"{_kind(row)}, expected an object")


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged or no Parquet file ({str(error).splitlines()[0]})") from None


def _field(row: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key."""
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise BadRowError(f'no "{key}"{nearest(part, value) if isinstance(value, Mapping) else ""}')
        value = value[part]
    return value


def _question(value: Any, key: str) -> Question:
    if isinstance(value, str):
        return _text(value, f'"{key}"')
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {_kind(value)}, expected text or a list of turns')
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRowError(f'"{key}" has a turn that is no {{"role", "content"}}')
        turns.append({name: _text(turn[name], f'"{key}", {name}') for name in ("role", "content")})
    if not turns or turns[-1]["role"] == "assistant":
        raise BadRowError(f'"{key}" {"ends with a turn of the assistant" if turns else "is empty"}')
    return turns


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name} is {_kind(value)}, expected text")
    if not value.strip():
        raise BadRowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{name} holds half a character (a lone surrogate)") from None
    return value


def _ground_truth(value: Any, key: str, is_free: bool) -> str:
    """Text as it is, numbers as text; lists and objects, as JSON, only for those who read the row themselves."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if is_number or (is_free and isinstance(value, list | dict)):
        return json.dumps(value, default=str)
    return _text(value, f'"{key}"')


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
