"""Read the rows of a run that the checks need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.audit.distributions import Distributions
from entrace.analysis.audit.findings import LackingError
from entrace.analysis.audit.fits import Fit, fit_sampling
from entrace.analysis.runs import Runs
from entrace.analysis.trace.manifest import IMPORTED

if TYPE_CHECKING:
    import polars as pl

# Tokens of evenly spaced steps that are read of each run.
MAX_TOKENS = 200_000
MIN_TOKENS, MIN_RESPONSES = 1000, 20


@dataclass(frozen=True)
class Sample:
    """Hold the rows of one run that the checks read.

    Attributes:
        tokens: Tokens of evenly spaced steps in the order of responses and positions.
        responses: All responses of the run.
        num_entries: Entries of the vocabulary.
        form: Format of the dump that the run was imported from; empty for other runs.
    """

    tokens: pl.DataFrame
    responses: pl.DataFrame
    num_entries: int
    form: str = ""

    @classmethod
    def of(cls, runs: Runs, run_id: str) -> Sample:
        """Return the sample of one run."""
        import polars as pl

        responses = runs.run_shipped(RESPONSES, {"run": run_id})
        steps = responses["step"].unique().sort()
        total = int(responses["response_length"].fill_null(0).sum())
        stride = max(1, -(-total // MAX_TOKENS))
        tokens = runs.run_shipped(TOKENS, {"run": run_id, "steps": steps.gather_every(stride).to_list()})
        num_entries = runs.run_shipped(ENTRIES, {"run": run_id}).item()
        form = (runs.manifests[run_id].get(IMPORTED) or {}).get("format", "")
        return cls(tokens.with_columns(pl.col(pl.Float32).cast(pl.Float64)), responses, num_entries, form)

    def known(self, *columns: str) -> pl.DataFrame:
        """Return the tokens with values in all ``columns``.

        Raises:
            LackingError: there are too few.
        """
        found = self.tokens.drop_nulls(list(columns))
        if found.height < MIN_TOKENS:
            raise LackingError(f"{found.height:,} tokens have {' and '.join(columns)}; {MIN_TOKENS:,} are needed")
        return found


@dataclass(frozen=True)
class Reference:
    """Hold a model's distributions at the generated tokens of some responses.

    Attributes:
        name: The model.
        about: Which rows were compared, and why these.
        tokens: N tokens in the order of responses and positions.
        model: Their distributions.
        is_canonical: Whether the text of the token's response, tokenized again, gives its token ids, (N,); None if
            unknown.
    """

    name: str
    about: str
    tokens: pl.DataFrame
    model: Distributions
    is_canonical: np.ndarray | None = None

    @cached_property
    def responses(self) -> np.ndarray:
        """Return the response of each token, (N,)."""
        return self.tokens["rollout_id"].to_numpy()

    @cached_property
    def sampling(self) -> Fit:
        """Return the distribution that explains the sampled tokens best."""
        return fit_sampling(self.model)

    @property
    def expected(self) -> float:
        """Return ln of the inverse temperature, as recorded if the tokens agree.

        Otherwise the temperature is the one fitted to the tokens.
        """
        recorded = self.tokens["temperature"].drop_nulls().unique().to_list()
        if len(recorded) == 1 and recorded[0] > 0:
            x = -float(np.log(recorded[0]))
            if abs(x - self.sampling.x) < 5 * self.sampling.error:
                return x
        return self.sampling.x

    def known(self, column: str) -> Reference:
        """Return the tokens with a value in ``column``.

        Raises:
            LackingError: there are too few.
        """
        rows = np.flatnonzero(self.tokens[column].is_not_null().to_numpy())
        if len(rows) < MIN_TOKENS:
            raise LackingError(
                f"{len(rows):,} of the tokens that the model read have {column}; {MIN_TOKENS:,} are needed"
            )
        is_canonical = None if self.is_canonical is None else self.is_canonical[rows]
        found = replace(self, tokens=self.tokens[rows], model=self.model.take(rows), is_canonical=is_canonical)
        # Of all tokens.
        vars(found)["sampling"] = self.sampling
        return found


def read_responses(runs: Runs, run_id: str, rollouts: Iterable[int]) -> pl.DataFrame:
    """Return all tokens of some responses, context included.

    Tokens are in the order of responses and positions.
    """
    import polars as pl

    found = runs.run_shipped(ALL_TOKENS, {"run": run_id, "rollouts": list(rollouts)})
    return found.with_columns(pl.col(pl.Float32).cast(pl.Float64))


RESPONSES = """
select step, rollout_id, group_id, prompt_id, policy_step, reward + coalesce(length_penalty, 0) as reward, advantage,
  response_length
from rollouts where run_id = $run order by step, rollout_id
"""
TOKENS = """
select tokens.step, tokens.rollout_id, rollouts.group_id, position, token_id, logprob, entropy, sampling_logprob, turn,
  tokens.response_length, rollouts.generated_length, rollouts.is_truncated
from tokens left join rollouts using (run_id, rollout_id)
where tokens.run_id = $run and list_contains($steps, tokens.step) order by tokens.rollout_id, position
"""
ALL_TOKENS = """
select tokens.step, tokens.rollout_id, position, token_id, logprob, entropy, sampling_logprob, policy_version,
  coalesce(loss_mask, true) as is_generated, rollouts.temperature
from response_tokens as tokens left join rollouts using (run_id, rollout_id)
where tokens.run_id = $run and list_contains($rollouts, tokens.rollout_id) order by tokens.rollout_id, position
"""
PROMPTS = "select prompt_id, prompt from prompts where run_id = $run and split = 'train'"
ENTRIES = "select count(*) from vocab where run_id = $run"
