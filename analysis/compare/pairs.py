"""Pair runs by seed, and say why a run takes no part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entrace.analysis.runs import Runs

# Entries of manifest key common_random_numbers that two runs must share, and their names.
SHARED = {
    "base_policy": "the base policy",
    "prompts": "the prompts",
    "evaluation": "the random numbers of the evaluation",
}


EVALUATED = "select distinct run_id, benchmark, step from evals where step > 0 and is_correct is not null"


@dataclass(frozen=True)
class Pair:
    """A complete run, and the complete run of another arm with the same seed that it is compared with.

    Attributes:
        is_extra: ``baseline`` is not the baseline of the run's own study but a reference named by a claim.
    """

    arm: str
    baseline: str
    seed: int
    run: str
    baseline_run: str
    is_extra: bool = False

    @property
    def run_ids(self) -> tuple[str, str]:
        """The run, then the baseline's."""
        return self.run, self.baseline_run


def pair_runs(runs: Runs, references: Mapping[str, str]) -> tuple[list[Pair], dict[str, str]]:
    """Pair every complete run with its baseline run, and with the run of its reference arm where one is named.

    Args:
        runs: The runs.
        references: Arm to compare an arm with in addition to its baseline.

    Returns:
        The pairs in order of the runs, and the reason by run_id for every run that takes no part.
    """
    by_seed, reasons = _complete_runs(runs)
    evaluated: dict[str, set[tuple[str, int]]] = {}
    for run, *evaluation in runs.sql(EVALUATED).iter_rows():
        evaluated.setdefault(run, set()).add(tuple(evaluation))
    pairs = []
    for (arm, seed), run in by_seed.items():
        own = _baseline(runs, run)
        for baseline in dict.fromkeys((own, references.get(arm, own))):
            if arm == baseline:
                continue
            other = by_seed.get((baseline, seed))
            if other is None:
                reason = f"no complete run of arm {baseline} has seed {seed}"
            elif unshared := _unshared(runs.manifests[run], runs.manifests[other]):
                reason = f"does not share {unshared} with {other}"
            elif not evaluated.get(run, set()) & evaluated.get(other, set()):
                reason = f"has no evaluation after training in common with {other}"
            else:
                pairs.append(Pair(arm, baseline, seed, run, other, baseline != own))
                continue
            reasons.setdefault(run, reason)
    used = {run for pair in pairs for run in pair.run_ids}
    for (arm, seed), run in by_seed.items():
        if arm == _baseline(runs, run):
            reasons.setdefault(run, f"no run of another arm with seed {seed} can be compared with it")
    return pairs, {run: reason for run, reason in reasons.items() if run not in used}


def why_nothing_to_compare(runs: Runs, references: Mapping[str, str]) -> str:
    """Return why no run could have a partner, in one line; empty where some could."""
    arms = {arm_of(manifest) for manifest in runs.manifests.values()}
    baselines = {_baseline(runs, run) for run in runs.manifests}
    if any(arm in arms and reference in arms for arm, reference in references.items()):
        return ""
    if not baselines & arms:
        return f'compare: no run is of the baseline arm "{sorted(baselines)[0]}"; found {", ".join(sorted(arms))}'
    if arms <= baselines:
        return f"compare: every run is of the baseline arm ({', '.join(sorted(arms))}); name runs of others"
    return ""


def _complete_runs(runs: Runs) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """Return the complete run of each arm and seed, and the reason why others take no part."""
    by_seed: dict[tuple[str, int], str] = {}
    reasons: dict[str, str] = {}
    for run, manifest in runs.manifests.items():
        key = (arm_of(manifest), int(manifest.get("seed") or 0))
        status = manifest.get("status")
        if status == "failed":
            reasons[run] = f"failed: {manifest.get('error') or 'no error was recorded'}"
        elif status != "complete":
            reasons[run] = f"still {status}" if status else "its status was not recorded"
        elif key in by_seed:
            reasons[run] = f"{by_seed[key]} already stands for arm {key[0]} and seed {key[1]}"
        else:
            by_seed[key] = run
    return by_seed, reasons


def _unshared(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name what two runs are known not to share; a run that recorded nothing is assumed to share everything."""
    mine, theirs = (m.get("common_random_numbers") or {} for m in (manifest, other))
    return " and ".join(
        label for key, label in SHARED.items() if key in mine and key in theirs and mine[key] != theirs[key]
    )


def _baseline(runs: Runs, run: str) -> str:
    return runs.manifests[run].get("baseline") or runs.baseline


def arm_of(manifest: Mapping[str, Any]) -> str:
    """Return the label of a run's arm; a single run may have none."""
    return str(manifest.get("arm") or "-")
