"""The configuration of a task: sources of prompts, their mixture, and who judges answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from analysis.trace import nearest
from trainer.section import Positive, Section

VERIFIERS = ("exact", "math", "reasoning_gym")
# The key of task.verifiers that stands for all data sources not named there.
DEFAULT = "default"
ROW_FILES = (".jsonl", ".parquet")


def _check_verifier(name: str) -> str:
    if name not in VERIFIERS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f'"{name}" is neither module:function nor a verifier{nearest(name, VERIFIERS)}')
    return name


def _check_row_file(path: str) -> str:
    if not path.lower().endswith(ROW_FILES):
        raise ValueError(f'"{path}" is no {" or ".join(ROW_FILES)} file')
    return path


def _check_source(name: str) -> str:
    return _check_row_file(name) if re.search(r"[./\\]", name) else name


def _check_json(params: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(params, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected finite numbers, text, lists and tables ({error})") from None
    return params


RowFile = Annotated[str, AfterValidator(_check_row_file)]
SourceName = Annotated[str, AfterValidator(_check_source)]
VerifierName = Annotated[str, AfterValidator(_check_verifier)]


class FileParams(Section):
    """Fields of a file's rows, dotted where nested.

    ``answer`` is left to the row: ``reward_model.ground_truth``, as in verl's schema, or else ``answer``.
    """

    prompt: str = "prompt"
    answer: str | None = None
    data_source: str = "data_source"


class SourceConfig(Section):
    """Where prompts come from: a reasoning-gym task by name with its parameters, or a file of rows.

    ``num_heldout`` prompts are evaluated and never trained on; those of a file are drawn from its own rows, or from
    ``heldout_file``. ``params`` of a file are ``FileParams``. ``weight`` is the source's share of training prompts.
    """

    name: SourceName
    params: Annotated[dict[str, Any], AfterValidator(_check_json)] = Field(default_factory=dict)
    num_heldout: Positive = 200
    heldout_file: RowFile | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0

    @property
    def is_file(self) -> bool:
        """Whether ``name`` is a path."""
        return self.name.lower().endswith(ROW_FILES)

    @property
    def files(self) -> list[str]:
        """Paths of all files it reads."""
        return [path for path in (self.name, self.heldout_file) if path] if self.is_file else []

    @model_validator(mode="after")
    def _holds_out_its_own(self) -> SourceConfig:
        if self.heldout_file and not self.is_file:
            raise ValueError(f"heldout_file goes with a file of rows; {self.name} draws its own held-out prompts")
        return self


class TaskConfig(SourceConfig):
    """A source of prompts, others to mix it with by name, and who judges answers.

    ``verifiers`` maps data sources to exact, math, reasoning_gym, or a function as ``module:function``.
    """

    name: SourceName = "chain_sum"
    mix: dict[str, SourceConfig] = Field(default_factory=dict)
    verifiers: dict[str, VerifierName] = Field(default_factory=dict)
    on_bad_rows: Literal["stop", "skip"] = "stop"
    max_prompt_tokens: Positive | None = None

    @property
    def label(self) -> str:
        """What its own prompts call their task, where rows do not say."""
        return Path(self.name).stem if self.is_file else self.name

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """All sources by label, its own first."""
        return {self.label: self, **self.mix}

    @property
    def total_heldout(self) -> int:
        """Held-out prompts of all sources."""
        return sum(source.num_heldout for source in self.sources.values())

    @model_validator(mode="after")
    def _can_be_mixed(self) -> TaskConfig:
        if self.label in self.mix:
            raise ValueError(f'mix: "{self.label}" is the name of the task itself; choose another')
        if not any(source.weight for source in self.sources.values()):
            raise ValueError("no source has a weight above 0")
        return self
