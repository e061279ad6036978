"""Pair runs by seed and fingerprint, and give the reason why a run is excluded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entrace.analysis.runs import Runs

# Fingerprints under manifest key common_random_numbers that two runs must share, and their names.
SHARED = {
    "base_policy": "the base policy",
    "prompts": "the prompts",
    "evaluation": "the random numbers of the evaluation",
}
EVALUATED = "select distinct run_id, benchmark, step from evals where step > 0 and is_correct is not null"


@dataclass(frozen=True)
class Pair:
    """Hold a run and the run of another arm that it is compared with.

    Both runs are complete and have the same seed.

    Attributes:
        is_extra: True if ``baseline`` is a reference named by a claim, not the baseline of the run's study.
    """

    arm: str
    baseline: str
    seed: int
    run: str
    baseline_run: str
    is_extra: bool = False

    @property
    def run_ids(self) -> tuple[str, str]:
        """Return the run, then the baseline run."""
        return self.run, self.baseline_run


def pair_runs(runs: Runs, references: Mapping[str, str]) -> tuple[list[Pair], dict[str, str]]:
    """Pair every complete run with its baseline run.

    If its arm has a reference, the run is also paired with the run of the reference.

    Args:
        runs: The runs.
        references: By arm, a second arm to compare it with, besides its baseline.

    Returns:
        The pairs in the order of the runs, and the reason for every excluded run, by run_id.
    """
    by_seed, reasons = _complete_runs(runs)
    evaluated: dict[str, set[tuple[str, int]]] = {}
    for run, *evaluation in runs.run_shipped(EVALUATED).iter_rows():
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
                reason = f"differs from {other} in {unshared}"
            elif not evaluated.get(run, set()) & evaluated.get(other, set()):
                reason = f"shares no evaluation after training with {other}"
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
    """Return the reason why no runs can be paired, in one line; empty if some can."""
    arms = {arm_of(manifest) for manifest in runs.manifests.values()}
    baselines = {_baseline(runs, run) for run in runs.manifests}
    if any(arm in arms and reference in arms for arm, reference in references.items()):
        return ""
    if not baselines & arms:
        return f'compare: no run of the baseline arm "{sorted(baselines)[0]}"; found {", ".join(sorted(arms))}'
    if arms <= baselines:
        return f"compare: all runs are of the baseline arm ({', '.join(sorted(arms))}); add runs of other arms"
    return ""


def _complete_runs(runs: Runs) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """Return the complete run of each arm and seed, and why others are excluded."""
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
            reasons[run] = f"duplicate of {by_seed[key]}: arm {key[0]}, seed {key[1]}"
        else:
            by_seed[key] = run
    return by_seed, reasons


def _unshared(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the names of differing fingerprints.

    Fingerprints that a run did not record are assumed equal.
    """
    mine, theirs = (m.get("common_random_numbers") or {} for m in (manifest, other))
    return " and ".join(
        label for key, label in SHARED.items() if key in mine and key in theirs and mine[key] != theirs[key]
    )


def _baseline(runs: Runs, run: str) -> str:
    return runs.manifests[run].get("baseline") or runs.baseline


def arm_of(manifest: Mapping[str, Any]) -> str:
    """Return the name of a run's arm; ``-`` if it has none."""
    return str(manifest.get("arm") or "-")
