"""Configure a task: sources of prompts, their mixture, and their verifiers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from entrace.analysis.trace import nearest
from entrace.trainer.settings import BaseConfig, Natural, Positive

VERIFIERS = ("exact", "math", "math_text", "reasoning_gym")
# The key of task.verifiers for all data sources that have no key of their own.
DEFAULT = "default"
ROW_FILES = (".jsonl", ".parquet")
# The value of num_heldout that takes every distinct prompt of a file.
ALL = "all"


def _check_verifier(name: str) -> str:
    if name not in VERIFIERS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f'"{name}" is neither module:function nor a verifier{nearest(name, VERIFIERS)}')
    return name


def _check_row_file(path: str) -> str:
    if not path.lower().endswith(ROW_FILES):
        raise ValueError(f'"{path}" is not a {" or ".join(ROW_FILES)} file')
    return path


def _check_source(name: str) -> str:
    return _check_row_file(name) if re.search(r"[./\\]", name) else name


def _is_row_file(name: Any) -> bool:
    return isinstance(name, str) and name.lower().endswith(ROW_FILES)


def _check_heldout_files(files: Any) -> Any:
    """Accept a file, a list of files with distinct names, or a table of files.

    An empty value becomes None.
    """
    if not files:
        return None
    if isinstance(files, str):
        return _check_row_file(files)
    paths = list(files.values()) if isinstance(files, dict) else files
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"expected a file, a list of files, or a table of benchmark names and files, found {files!r}")
    for path in paths:
        _check_row_file(path)
    if isinstance(files, dict):
        if not all(name.strip() for name in files):
            raise ValueError("a benchmark name is blank; give each file a name")
        return files
    first: dict[str, str] = {}
    for path in paths:
        if (other := first.setdefault(Path(path).stem, path)) != path or paths.count(path) > 1:
            raise ValueError(
                f'both "{other}" and "{path}" would be the benchmark "{Path(path).stem}"; name them in a table, '
                f'heldout_file = {{ NAME = "{other}", OTHER_NAME = "{path}" }}'
            )
    return tuple(paths)


def _check_json(params: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(params, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected finite numbers, text, lists and tables ({error})") from None
    return params


SourceName = Annotated[str, AfterValidator(_check_source)]
VerifierName = Annotated[str, AfterValidator(_check_verifier)]


class FileParams(BaseConfig):
    """Keys of the fields in a file's rows, dotted where nested.

    ``answer`` defaults to ``reward_model.ground_truth``, as in verl's schema, in rows that have it, else ``answer``.
    """

    prompt: str = "prompt"
    answer: str | None = None
    data_source: str = "data_source"


class SourceConfig(BaseConfig):
    """A source of prompts: a reasoning-gym task, or a file of rows.

    ``name`` is the task's name or the file's path, and ``params`` are the task's parameters. ``num_heldout`` prompts
    are evaluated and never trained on. For a file, they are drawn from its own rows or from ``heldout_file``: one file,
    several, or a table of benchmark names and files, that many from each. By default, a held-out file and a file of
    weight 0 are evaluated in full ("all"), and other sources hold out 200. ``params`` of a file are ``FileParams``.
    ``weight`` is the source's share of training prompts.
    """

    name: SourceName
    params: Annotated[dict[str, Any], AfterValidator(_check_json)] = Field(default_factory=dict)
    num_heldout: Positive | Literal["all"] = 200
    heldout_file: Annotated[str | tuple[str, ...] | dict[str, str] | None, BeforeValidator(_check_heldout_files)] = None
    weight: Annotated[float, Field(ge=0)] = 1.0

    @property
    def is_file(self) -> bool:
        """Return whether ``name`` is a path."""
        return _is_row_file(self.name)

    @property
    def heldout_limit(self) -> int | None:
        """Return the largest number of held-out prompts per file or task.

        None holds out all prompts of a file.
        """
        return None if self.num_heldout == ALL else self.num_heldout

    @property
    def heldout_files(self) -> dict[str | None, str]:
        """Return the path of each held-out file by benchmark.

        The key is None for a single file, whose rows name the benchmark.
        """
        if isinstance(self.heldout_file, tuple):
            return {Path(path).stem: path for path in self.heldout_file}
        if isinstance(self.heldout_file, dict):
            return {**self.heldout_file}
        return {None: self.heldout_file} if self.heldout_file else {}

    @property
    def files(self) -> list[str]:
        """Return the paths of all files that the source reads."""
        return [self.name, *self.heldout_files.values()] if self.is_file else []

    @model_validator(mode="before")
    @classmethod
    def _evaluates_in_full(cls, values: Any) -> Any:
        """Hold out all prompts of files that are only evaluated, unless a number is set."""
        if not isinstance(values, dict) or "num_heldout" in values:
            return values
        is_evaluated_only = values.get("weight") == 0 and _is_row_file(values.get("name"))
        return {**values, "num_heldout": ALL} if values.get("heldout_file") or is_evaluated_only else values

    @model_validator(mode="after")
    def _holds_out_its_own(self) -> SourceConfig:
        if self.is_file:
            return self
        if self.heldout_file:
            raise ValueError(
                f"heldout_file needs a file of rows, and {self.name} generates its own held-out prompts; to evaluate "
                'a file as well, add a source of weight 0: task.mix.NAME = { name = "FILE", weight = 0 }'
            )
        if self.num_heldout == ALL:
            raise ValueError(
                f'num_heldout = "all" needs a file of rows, and {self.name} generates prompts without end; use a number'
            )
        return self


class TaskConfig(SourceConfig):
    """A source of prompts, further sources to mix in by name, and verifiers.

    A response is correct if its verifier's score reaches ``correct_at``. Its reward is the score, from 0 to 1, mapped
    to ``reward_values`` = [wrong, right]. ``heldout_seed`` chooses the held-out prompts, equal for runs of all seeds.
    ``verifiers`` maps data sources to exact, math (the answer must be marked, for example by a box), math_text (reads
    the whole text if no answer is marked), reasoning_gym, or a function as ``module:function``. ``default`` judges all
    data sources that are not named, including reasoning-gym tasks, which otherwise have their own scorers.
    """

    name: SourceName = "chain_sum"
    mix: dict[str, SourceConfig] = Field(default_factory=dict)
    heldout_seed: Natural = 0
    correct_at: float = 1.0
    reward_values: tuple[float, float] = (0.0, 1.0)
    verifiers: dict[str, VerifierName] = Field(default_factory=dict)
    on_bad_rows: Literal["stop", "skip"] = "stop"
    max_prompt_tokens: Positive | None = None

    @property
    def label(self) -> str:
        """Return the task name of the source's own rows that name no data source."""
        return Path(self.name).stem if self.is_file else self.name

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Return all sources by label, this one first."""
        return {self.label: self, **self.mix}

    @field_validator("reward_values")
    @classmethod
    def _rewards_right(cls, values: tuple[float, float]) -> tuple[float, float]:
        if not values[0] < values[1]:
            raise ValueError(f"expected [wrong, right] with wrong < right, found {list(values)}")
        return values

    @model_validator(mode="after")
    def _can_be_mixed(self) -> TaskConfig:
        if self.label in self.mix:
            raise ValueError(f'mix: "{self.label}" is the name of the task itself; choose another')
        if not any(source.weight for source in self.sources.values()):
            raise ValueError("no source has a weight above 0; training needs one")
        return self
