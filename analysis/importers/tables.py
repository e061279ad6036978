"""Turn chunks of rollouts into rows of the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from entrace.analysis.importers.rollout import RESCORED, Rollout
from entrace.analysis.trace.groups import group_relative_advantage, mean_of, shared_by
from entrace.analysis.trace.rows import ResponseRows, nullable
from entrace.analysis.trace.writer import TraceWriter

EXACT = "exact"
# Columns that rollouts and chunks hold under the same name.
AS_READ = ("prompt_id", "is_correct", "completion", "answer", "has_answer", "reward", "is_truncated")
MEASURED = ("logprob", "entropy", "advantage", "grad_norm", "sampling_logprob", "reference_logprob")


class TokenValues(Protocol):
    """Statistics of a teacher-forced pass.

    Each has one value per token of the responses, concatenated, float32 ``(N,)``.
    """

    @property
    def logprob(self) -> np.ndarray:
        """Return log-probabilities."""
        ...

    @property
    def entropy(self) -> np.ndarray:
        """Return entropies."""
        ...

    def grad_norm(self, advantages: np.ndarray) -> np.ndarray:
        """Return the norm of each token's policy gradient at the LM head, ``(N,)``."""
        ...


class Evaluator(Protocol):
    """A model that evaluates given responses."""

    @property
    def name(self) -> str:
        """Return where the model was loaded from."""
        ...

    def evaluate(self, chunk: Sequence[Rollout]) -> TokenValues:
        """Return the statistics of all tokens of the responses, context included."""
        ...


@dataclass
class Difference:
    """Absolute differences between recorded and rescored values of generated tokens."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, recorded: np.ndarray, rescored: np.ndarray) -> None:
        """Add the tokens whose recorded value is known."""
        is_known = ~np.isnan(recorded)
        found = np.abs(recorded[is_known] - rescored[is_known])
        if len(found):
            self.count += len(found)
            self.total += float(found.sum())
            self.largest = max(self.largest, float(found.max()))

    @property
    def mean(self) -> float:
        """Return the mean difference; 0 without tokens."""
        return self.total / self.count if self.count else 0.0


@dataclass
class Differences:
    """Differences of logprobs and entropies, in nats."""

    logprob: Difference = field(default_factory=Difference)
    entropy: Difference = field(default_factory=Difference)


@dataclass
class StepSums:
    """Sums behind the row of a step in table ``steps``."""

    rewarded: int = 0
    reward: float = 0.0
    judged: int = 0
    correct: int = 0
    known_answers: int = 0
    answered: int = 0
    tokens: int = 0
    with_entropy: int = 0
    entropy: float = 0.0
    groups: int = 0
    groups_kept: int = 0
    knows_kept: bool = True

    def columns(self) -> dict[str, Any]:
        """Return columns of table ``steps``."""
        return {
            "reward_mean": self.reward / self.rewarded if self.rewarded else None,
            "accuracy": self.correct / self.judged if self.judged else None,
            "format_rate": self.answered / self.known_answers if self.known_answers else None,
            "entropy_token_mean": self.entropy / self.with_entropy if self.with_entropy else None,
            "tokens": self.tokens,
            "groups_kept": self.groups_kept if self.knows_kept else None,
            "groups_dropped": self.groups - self.groups_kept if self.knows_kept else None,
        }


@dataclass(frozen=True)
class Chunk:
    """Rollouts of one step, in whole groups, with their values per token.

    Values of all responses are concatenated, ``(N,)`` float64. Unknown values are NaN. ``rows`` is the index of the
    response of each token.
    """

    rollouts: Sequence[Rollout]
    groups: np.ndarray
    rows: np.ndarray
    is_generated: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray
    sampling_logprob: np.ndarray
    reference_logprob: np.ndarray
    advantage: np.ndarray
    grad_norm: np.ndarray
    kinds: Sequence[tuple[str | None, str | None]]
    reference_entropy: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        evaluator: Evaluator | None,
        differences: Differences,
        *,
        has_advantages: bool,
        reference: Evaluator | None = None,
    ) -> Chunk:
        """Collect the recorded values, and evaluate what is missing.

        Args:
            rollouts: Rollouts of one step, in whole groups.
            evaluator: The model of the pass, or None.
            differences: Gets the differences between recorded and rescored values.
            has_advantages: The dump records advantages; otherwise they follow from the rewards.
            reference: The reference policy, or None.
        """
        groups = np.unique([rollout.group_id for rollout in rollouts], return_inverse=True)[1]
        lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
        rows = np.repeat(np.arange(len(rollouts)), lengths)
        is_generated = np.concatenate([np.array(rollout.is_generated) for rollout in rollouts])
        recorded = {
            name: _per_token([getattr(rollout, name) for rollout in rollouts], lengths, is_generated)
            for name in ("logprob", "entropy", "sampling_logprob", "reference_logprob")
        }
        advantage = _advantages(rollouts, groups, rows, has_advantages, lengths)
        advantage[~is_generated] = np.nan
        kinds = [(r.logprob_kind, EXACT if r.entropy is not None else None) for r in rollouts]
        grad_norm = np.full(len(rows), np.nan)
        if evaluator:
            found = evaluator.evaluate(rollouts)
            differences.logprob.add(recorded["logprob"][is_generated], found.logprob[is_generated])
            differences.entropy.add(recorded["entropy"][is_generated], found.entropy[is_generated])
            for name, values in (("logprob", found.logprob), ("entropy", found.entropy)):
                is_missing = np.array([getattr(rollout, name) is None for rollout in rollouts])[rows] & is_generated
                recorded[name][is_missing] = values[is_missing]
            kinds = [(kind or RESCORED, EXACT) for kind, _ in kinds]
            grad_norm = found.grad_norm(advantage.astype(np.float32)).astype(np.float64)
        reference_entropy = None
        if reference:
            found = reference.evaluate(rollouts)
            is_missing = np.isnan(recorded["reference_logprob"]) & is_generated
            recorded["reference_logprob"][is_missing] = found.logprob[is_missing]
            reference_entropy = np.where(is_generated, found.entropy, np.nan)
        return cls(
            rollouts,
            groups,
            rows,
            is_generated,
            **recorded,
            advantage=advantage,
            grad_norm=grad_norm,
            kinds=kinds,
            reference_entropy=reference_entropy,
        )

    def write(self, writer: TraceWriter, first_rollout_id: int, temperature: float | None, sums: StepSums) -> None:
        """Append rows to ``rollouts`` and ``tokens``, and add to the step's sums."""
        rollouts = self.rollouts
        size = len(rollouts)
        is_kept, knows_kept = self._kept()
        as_read = {name: [getattr(rollout, name) for rollout in rollouts] for name in AS_READ}
        rows = ResponseRows(
            step=rollouts[0].step,
            rollout_ids=first_rollout_id + np.arange(size),
            groups=self.groups,
            prompt_ids=as_read["prompt_id"],
            lengths=np.bincount(self.rows, minlength=size),
            is_correct=as_read["is_correct"],
            is_kept=is_kept,
        )
        generated = self.rows[self.is_generated]
        num_generated = np.bincount(generated, minlength=size)
        surprisal = mean_of(-self.logprob[self.is_generated], generated, size)
        entropy_mean = mean_of(self.entropy[self.is_generated], generated, size)
        logged = np.array([np.nan if r.entropy_mean is None else r.entropy_mean for r in rollouts])
        entropy_mean = np.where(np.isnan(entropy_mean), logged, entropy_mean)
        # Standardized only in groups whose perplexities are all known.
        has_ppl_z = ~np.isin(self.groups, self.groups[np.isnan(surprisal)])
        # Placeholders of unknown texts have no defects of their own.
        prompts, completions = zip(
            *((r.prompt, r.completion) if r.has_text else ("", "") for r in rollouts), strict=True
        )
        judged = {name: as_read[name] for name in ("has_answer", "is_truncated")}
        writer.append(
            "rollouts",
            {
                **rows.rollout_columns(prompts, completions, **judged),
                **rows.generated_columns(num_generated, entropy_mean, surprisal, has_ppl_z),
                **as_read,
                # DuckDB gives a map as a mapping; Arrow takes pairs.
                "reward_components": [r.reward_components and [*dict(r.reward_components).items()] for r in rollouts],
                "advantage": nullable(shared_by(self.advantage[self.is_generated], generated, size)),
                "temperature": [r.temperature if r.temperature is not None else temperature for r in rollouts],
                "entropy_kind": [kind for _, kind in self.kinds],
                "logprob_kind": [kind for kind, _ in self.kinds],
            },
        )
        writer.append(
            "tokens",
            {
                **rows.token_columns(self.rows),
                **({} if knows_kept else {"is_kept": None}),
                **{name: nullable(getattr(self, name)) for name in MEASURED},
                "shaped_advantage": nullable(self.advantage),
                "reference_entropy": None if self.reference_entropy is None else nullable(self.reference_entropy),
                "token_id": np.concatenate([rollout.response_ids for rollout in rollouts]),
                "loss_mask": pa.array(self.is_generated, mask=(num_generated == rows.lengths)[self.rows]),
                "turn": _integers(rollouts, "turn"),
                "policy_version": _integers(rollouts, "policy_version"),
            },
        )
        self._add(sums, is_kept, knows_kept)

    def _kept(self) -> tuple[np.ndarray, bool]:
        """Return which responses entered the update, (B,), and whether that is known.

        Without a record, a group entered it if any of its advantages is not 0: otherwise its gradient was 0.
        """
        recorded = [rollout.is_kept for rollout in self.rollouts]
        size = int(self.groups.max()) + 1
        known = ~np.isnan(self.advantage)
        if not known.any():
            return np.array([kept is not False for kept in recorded]), None not in recorded
        largest = np.zeros(size)
        np.maximum.at(largest, self.groups[self.rows][known], np.abs(self.advantage[known]))
        inferred = (largest > 0)[self.groups]
        return np.array([inferred[n] if kept is None else kept for n, kept in enumerate(recorded)]), True

    def _add(self, sums: StepSums, is_kept: np.ndarray, knows_kept: bool) -> None:
        rollouts = self.rollouts
        rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
        sums.rewarded += len(rewards)
        sums.reward += sum(rewards)
        verdicts = [rollout.is_correct for rollout in rollouts if rollout.is_correct is not None]
        sums.judged += len(verdicts)
        sums.correct += sum(verdicts)
        sums.known_answers += sum(rollout.has_answer is not None for rollout in rollouts)
        sums.answered += sum(bool(rollout.has_answer) for rollout in rollouts)
        sums.tokens += int(self.is_generated.sum())
        entropy = self.entropy[self.is_generated]
        sums.with_entropy += int((~np.isnan(entropy)).sum())
        sums.entropy += float(np.nansum(entropy))
        sums.groups += int(self.groups.max()) + 1
        sums.groups_kept += len(np.unique(self.groups[is_kept]))
        sums.knows_kept &= knows_kept


def _advantages(
    rollouts: Sequence[Rollout], groups: np.ndarray, rows: np.ndarray, has_advantages: bool, lengths: np.ndarray
) -> np.ndarray:
    """Return the advantage of each token, recorded or from the rewards of the group."""
    if not has_advantages:
        rewards = np.array([np.nan if rollout.reward is None else rollout.reward for rollout in rollouts])
        return np.where(np.isnan(rewards), np.nan, group_relative_advantage(rewards, groups))[rows]
    values = np.array([np.nan if rollout.advantage is None else rollout.advantage for rollout in rollouts])[rows]
    starts = np.cumsum(lengths) - lengths
    for start, rollout in zip(starts, rollouts, strict=True):
        if rollout.advantages is not None:
            values[start : start + len(rollout.advantages)] = np.array(rollout.advantages, dtype=np.float64)
    return values


def _per_token(values: Sequence[Any], lengths: np.ndarray, is_generated: np.ndarray) -> np.ndarray:
    """Return recorded values of all tokens, NaN where unknown and for context."""
    parts = [
        np.full(length, np.nan) if entry is None else np.array(entry, dtype=np.float64)
        for entry, length in zip(values, lengths, strict=True)
    ]
    found = np.concatenate(parts)
    found[~is_generated] = np.nan
    return found


def _integers(rollouts: Sequence[Rollout], name: str) -> list[int | None] | None:
    """Return a value per token, None if no response has any."""
    if all(getattr(rollout, name) is None for rollout in rollouts):
        return None
    return [value for r in rollouts for value in (getattr(r, name) or [None] * len(r.response_ids))]
