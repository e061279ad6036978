"""Which run is compared with which, and why a run takes no part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from analysis.runs import Runs
from analysis.trace.errors import InputError

# Manifest key common_random_numbers: what two runs must share, and what it is called.
SHARED = {
    "base_policy": "the base policy",
    "prompts": "the prompts",
    "evaluation": "the random numbers of the evaluation",
}


EVALUATED = "select distinct run_id, benchmark, step from evals where step > 0"


@dataclass(frozen=True)
class Pair:
    """A complete run and the complete run of its own baseline that has the same seed."""

    arm: str
    baseline: str
    seed: int
    run: str
    baseline_run: str

    @property
    def run_ids(self) -> tuple[str, str]:
        """The run, then the baseline's."""
        return self.run, self.baseline_run


def pair_runs(runs: Runs) -> tuple[list[Pair], dict[str, str]]:
    """Pairs every complete run with its baseline run, and says why others have none.

    Returns:
        The pairs in order of the runs, and the reason by run_id of every run that takes no part.

    Raises:
        InputError: no run is of a baseline arm, or every run is.
    """
    _check_arms(runs)
    by_seed, reasons = _complete_runs(runs)
    evaluated: dict[str, set[tuple[str, int]]] = {}
    for run, *evaluation in runs.sql(EVALUATED).iter_rows():
        evaluated.setdefault(run, set()).add(tuple(evaluation))
    pairs = []
    for (arm, seed), run in by_seed.items():
        baseline = _baseline(runs, run)
        if arm == baseline:
            continue
        other = by_seed.get((baseline, seed))
        if other is None:
            reasons[run] = f"no complete run of arm {baseline} has seed {seed}"
        elif unshared := _unshared(runs.manifests[run], runs.manifests[other]):
            reasons[run] = f"does not share {unshared} with {other}"
        elif not evaluated.get(run, set()) & evaluated.get(other, set()):
            reasons[run] = f"has no evaluation after training in common with {other}"
        else:
            pairs.append(Pair(arm, baseline, seed, run, other))
    return pairs, reasons | _lonely_baselines(runs, by_seed, pairs)


def _check_arms(runs: Runs) -> None:
    arms = {arm_of(manifest): run for run, manifest in runs.manifests.items()}
    baselines = {_baseline(runs, run) for run in runs.manifests}
    if not baselines & set(arms):
        missing = sorted(baselines)[0]
        raise InputError(f'compare: no run is of the baseline arm "{missing}"; found {", ".join(sorted(arms))}')
    if set(arms) <= baselines:
        raise InputError(f"compare: every run is of the baseline arm ({', '.join(sorted(arms))}); name runs of others")


def _complete_runs(runs: Runs) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """Complete run of each arm and seed, and the reason why others are none."""
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


def _lonely_baselines(runs: Runs, by_seed: Mapping[tuple[str, int], str], pairs: list[Pair]) -> dict[str, str]:
    used = {run for pair in pairs for run in pair.run_ids}
    return {
        run: f"no run of another arm with seed {seed} can be compared with it"
        for (arm, seed), run in by_seed.items()
        if arm == _baseline(runs, run) and run not in used
    }


def _unshared(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What two runs are known not to share; runs that did not record it are taken at their word."""
    mine, theirs = (m.get("common_random_numbers") or {} for m in (manifest, other))
    return " and ".join(
        label for key, label in SHARED.items() if key in mine and key in theirs and mine[key] != theirs[key]
    )


def _baseline(runs: Runs, run: str) -> str:
    return runs.manifests[run].get("baseline") or runs.baseline


def arm_of(manifest: Mapping[str, Any]) -> str:
    """Label of a run's arm; a run by itself may have none."""
    return str(manifest.get("arm") or "-")
