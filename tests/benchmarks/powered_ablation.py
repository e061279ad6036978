"""Write the page of the powered ablation from its studies, one per task.

``make ablation-powered`` trains them. Each arm is trained at the learning rate that gave it the highest held-out
accuracy on the seeds of the study of rates, which the compared study does not use. Rates whose mean accuracies differ
by at most one standard error are tied, and the lowest of them is chosen, since its runs vary least between seeds. This
is the rule of one standard error (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from statistics import fmean

import numpy as np
import polars as pl

from entrace.analysis.compare import compare
from entrace.analysis.compare.paired import over_seeds
from entrace.analysis.runs import Runs, open_runs
from entrace.analysis.statistics.estimates import Estimate, holm
from entrace.analysis.trace import InputError
from tests.markdown import table

METRICS = {"avg_at_k": "accuracy at the end (avg@k)", "accuracy_auc": "mean accuracy over training"}
# Largest detectable differences that the design aims at, in accuracy.
METHODS = ("ppl", "position", "ppl+position")
AIMS = {"ppl or position": (("ppl", "position"), 0.015), "ppl+position": (("ppl+position",), None)}
OF_CONTROLS = 0.02
# Controls of each method: weights of the same size on other responses or tokens, or on all alike.
CONTROLS = {
    "ppl": ("ppl_permuted", "ppl_high", "scale_matched_ppl"),
    "position": ("position_reversed", "scale_matched_position"),
}
REASONING_WORDS = ("logical_structuring", "metacognitive")

COURSE = """
    select step, avg(is_correct::int) as accuracy, avg(response_length) as length, avg(entropy_mean) as entropy
    from evals join runs using (run_id) where arm = $arm group by step order by step
"""
SHARES = """
    select category, count(*) / sum(count(*)) over () as share
    from tokens join runs using (run_id) where arm = $arm group by category
"""


@dataclass(frozen=True)
class Trial:
    """A study on one task, and the study that chose its learning rates."""

    name: str
    study: Runs
    rates: Runs

    @cached_property
    def accuracies(self) -> dict[str, dict[float, list[float]]]:
        """Accuracies at the end of the study of rates, by arm and rate."""
        return self._by_rate("avg_at_k")

    def effect_of_rate(self) -> tuple[float, float, Estimate]:
        """Return the lowest rate, the highest, and what the highest gains.

        The gain is the difference in mean accuracy over training, paired by seed and averaged over arms.
        """
        found = self._by_rate("accuracy_auc")
        rates = sorted({rate for by in found.values() for rate in by})
        gains = [np.subtract(by[rates[-1]], by[rates[0]]) for by in found.values()]
        return rates[0], rates[-1], over_seeds(np.concatenate(gains)).estimate

    @cached_property
    def _by_seed(self) -> pl.DataFrame:
        return compare(self.rates).by_seed

    def _by_rate(self, metric: str) -> dict[str, dict[float, list[float]]]:
        """Return one value per seed of the study of rates, by arm and rate."""
        rates = {manifest["arm"]: manifest["config"]["optim"]["lr"] for manifest in self.rates.manifests.values()}
        rows = self._by_seed.filter(metric=metric)
        own, baselines = (
            rows.select("arm", "seed", "value"),
            rows.select(arm="baseline", seed="seed", value="baseline_value"),
        )
        found: dict[str, dict[float, list[float]]] = {}
        for arm, _, value in pl.concat([own, baselines]).unique(["arm", "seed"]).sort("arm", "seed").iter_rows():
            found.setdefault(arm.split(" [")[0], {}).setdefault(rates[arm], []).append(value)
        return found

    @cached_property
    def tie(self) -> float:
        """Standard error of the difference between an arm's means at two rates."""
        groups = [found for by in self.accuracies.values() for found in by.values()]
        if min(map(len, groups)) < 2:
            raise InputError(f"rates-{self.name}: an arm has one seed at a rate; a standard error needs two")
        return difference_error(groups)

    def chosen(self) -> dict[str, float]:
        """Return the lowest rate within ``tie`` of the best accuracy, by arm.

        Raises:
            InputError: an arm was trained at another rate, or seeds are in both studies.
        """
        best = {}
        for arm, by in self.accuracies.items():
            means = {rate: fmean(found) for rate, found in by.items()}
            best[arm] = min(rate for rate, mean in means.items() if mean >= max(means.values()) - self.tie)
        for manifest in self.study.manifests.values():
            rate = manifest["config"]["optim"]["lr"]
            if rate != best.get(manifest["arm"]):
                chosen = f"{best[manifest['arm']]:g}" if manifest["arm"] in best else "none"
                raise InputError(f"{self.name}: {manifest['arm']} was trained at {rate:g}, chosen: {chosen}")
        seeds = [{manifest["seed"] for manifest in runs.manifests.values()} for runs in (self.study, self.rates)]
        if common := seeds[0] & seeds[1]:
            raise InputError(f"{self.name}: seeds {sorted(common)} chose the learning rates and are compared too")
        return best


def difference_error(groups: Sequence[Sequence[float]]) -> float:
    r"""Return the standard error of the difference of two means, with one variance for all groups.

    It is s sqrt(2 / n), with s^2 = \sum_g \sum_i (x_gi - mean_g)^2 / \sum_g (n_g - 1) and n the size of the smallest
    group.
    """
    squares = sum((value - fmean(group)) ** 2 for group in groups for value in group)
    freedom = sum(len(group) - 1 for group in groups)
    return sqrt(squares / freedom * 2 / min(map(len, groups)))


def describe_tasks(trials: Sequence[Trial]) -> list[str]:
    """Return a table of what the baseline does on each task."""
    rows = []
    for trial in trials:
        own = {"arm": trial.study.baseline}
        course, shares = trial.study.sql(COURSE, own), dict(trial.study.sql(SHARES, own).iter_rows())
        params = next(iter(trial.study.manifests.values()))["config"]["task"]["params"]
        words = sum(shares.get(name, 0) for name in REASONING_WORDS)
        rows.append(
            [
                trial.name,
                " to ".join(map(str, sorted({params["min_terms"], params["max_terms"]}))),
                *(_course(course[name], digits) for name, digits in (("accuracy", 3), ("length", 1), ("entropy", 3))),
                f"{words:.3f}",
                f"{shares.get('formal_reasoning', 0):.3f}",
            ]
        )
    names = ["task", "terms", "accuracy", "tokens per response", "entropy", "reasoning words", "formal tokens"]
    return table(names, rows)


def describe_rates(trials: Sequence[Trial]) -> list[str]:
    """Return a table of the mean accuracy of each arm at each learning rate."""
    header = ["arm"]
    rows: dict[str, list[str]] = {}
    for trial in trials:
        best = trial.chosen()
        rates = sorted({rate for by in trial.accuracies.values() for rate in by})
        header += [f"{trial.name}, {rate:g}" for rate in rates]
        for arm, by in trial.accuracies.items():
            means = {rate: f"{fmean(by[rate]):.3f}" for rate in rates}
            rows.setdefault(arm, [arm]).extend(
                f"**{means[rate]}**" if rate == best[arm] else means[rate] for rate in rates
            )
    return table(header, list(rows.values()))


def describe_effect_of_rate(trial: Trial) -> str:
    """Return a line on the gain in mean accuracy over training by the higher rate."""
    low, high, gain = trial.effect_of_rate()
    interval = f"[{gain.low:+.4f}, {gain.high:+.4f}]"
    return (
        f"- {trial.name}: mean accuracy over training at {high:g} minus that at {low:g}: {gain.value:+.4f} {interval}"
    )


def describe_differences(found: pl.DataFrame, metric: str) -> list[str]:
    """Return a table of the differences in one metric, with intervals and verdicts."""
    rows = [
        [
            f"{row['arm']} − {row['baseline']}",
            *_cells(row["difference"], row["low"], row["high"], row["p_adjusted"]),
            f"{row['detectable']:.4f}",
            row["verdict"],
        ]
        for row in found.filter(metric=metric).iter_rows(named=True)
    ]
    return table(["difference", "estimate", "95% interval", "p (Holm)", "detectable", "verdict"], rows)


def describe_power(found: pl.DataFrame, baseline: str) -> list[str]:
    """Return what the design detects beside what it aims at, as sentences of a list."""
    lines = []
    for metric, name in METRICS.items():
        of_metric = found.filter(metric=metric, baseline=baseline)
        controls = tuple(set(of_metric["arm"]) - set(METHODS))
        for words, (arms, aim) in {**AIMS, "the controls": (controls, OF_CONTROLS)}.items():
            largest = of_metric.filter(pl.col("arm").is_in(arms))["detectable"].max()
            if isinstance(largest, float):
                state = f" (aim {aim}: {'met' if largest <= aim else 'missed'})" if aim else ""
                lines.append(f"- {name}: {largest:.4f} between {words} and {baseline}{state}")
    return lines


def describe_controls(by_seed: pl.DataFrame, rates: Mapping[str, float]) -> list[str]:
    """Return a table of each method against its controls of the same learning rate.

    A difference is the mean over seeds of the difference of two gains over the baseline, with Student's t interval.
    """
    found = []
    for method in METHODS:
        for control in (control for name in method.split("+") for control in CONTROLS[name]):
            if {method, control} <= rates.keys() and rates[method] == rates[control]:
                found += [(method, control, metric, _paired(by_seed, method, control, metric)) for metric in METRICS]
    adjusted = holm([estimate.p_value for *_, estimate in found])
    rows = [
        [
            f"{method} − {control}",
            METRICS[metric],
            *_cells(estimate.value, estimate.low, estimate.high, p),
        ]
        for (method, control, metric, estimate), p in zip(found, adjusted, strict=True)
    ]
    return table(["difference", "metric", "estimate", "95% interval", "p (Holm)"], rows)


def describe_gain(found: pl.DataFrame, metric: str, baseline: str) -> str:
    """Return a sentence on the largest gain that no interval excludes."""
    methods = found.filter(pl.col("arm").is_in(METHODS), metric=metric, baseline=baseline)
    best = methods.sort("high", descending=True).row(0, named=True)
    return f"The intervals exclude gains of the methods above {best['high']:.4f} ({best['arm']})."


def write_page(trials: Sequence[Trial], page: str) -> str:
    """Return the page; ``page`` is the name of its folder of reports."""
    ties = ", ".join(f"{trial.tie:.4f} on {trial.name}" for trial in trials)
    lines = [
        "# An ablation with power for gains of 1 to 2 points",
        "",
        "`make ablation-powered` trains the runs and writes this page. All arms of a seed share base policy, prompts,",
        "and random numbers; every seed has prompts of its own. Differences are of accuracy: .01 is one point.",
        "",
        "## Tasks",
        "",
        "Means of the baseline; from the first evaluation to the last, and shares of all training tokens.",
        "",
        *describe_tasks(trials),
        "",
        "## Learning rates",
        "",
        "Mean accuracy at the end on seeds that are not compared. Each arm is trained at the rate in bold: the lowest",
        f"one within one standard error of the best ({ties}), since runs at lower rates vary less.",
        "",
        *describe_rates(trials),
        "",
        "The rate alone changes how fast the policy learns. Over all arms and both seeds, paired:",
        "",
        *(describe_effect_of_rate(trial) for trial in trials),
    ]
    for trial in trials:
        comparison, rates = compare(trial.study), trial.chosen()
        found = comparison.differences
        seeds = {
            row["arm"]: row["num_seeds"]
            for row in found.filter(metric="avg_at_k", baseline=trial.study.baseline).iter_rows(named=True)
        }
        prompts = found["num_prompts"].drop_nulls()[0]
        lines += [
            "",
            f"## {trial.name.capitalize()}",
            "",
            f"{_seeds(seeds)}, {prompts} held-out prompts. [Report]({page}/{trial.name}/report.html)",
            "",
            "What the design detects with 80% power at the strictest step of Holm's correction:",
            "",
            *describe_power(found, trial.study.baseline),
        ]
        for metric, name in METRICS.items():
            lines += ["", f"### {name[0].upper()}{name[1:]}", "", *describe_differences(found, metric)]
            lines += ["", describe_gain(found, metric, trial.study.baseline)]
        lines += [
            "",
            "### Methods against their controls",
            "",
            "A gain over the baseline can come from the learning rate. These controls have the method's rate.",
            "Intervals are over seeds, and Holm's correction covers this table.",
            "",
            *describe_controls(comparison.by_seed.filter(baseline=trial.study.baseline), rates),
        ]
    return "\n".join(lines) + "\n"


def _cells(value: float, low: float, high: float, p: float) -> list[str]:
    return [f"{value:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{p:.2g}"]


def _paired(by_seed: pl.DataFrame, arm: str, control: str, metric: str) -> Estimate:
    own, other = (by_seed.filter(arm=name, metric=metric).select("seed", "difference") for name in (arm, control))
    both = own.join(other, on="seed", suffix="_of_control")
    return over_seeds((both["difference"] - both["difference_of_control"]).to_numpy()).estimate


def _course(values: pl.Series, digits: int) -> str:
    return f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}"


def _seeds(counts: Mapping[str, int]) -> str:
    low, high = min(counts.values()), max(counts.values())
    return f"{low} seeds per arm" if low == high else f"{low} to {high} seeds per arm"


def main() -> None:
    """Read the studies, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="Folder with the studies NAME and rates-NAME of each task.")
    parser.add_argument("--task", action="append", help="NAME of a task (default: short and long).")
    parser.add_argument("--out", type=Path, help="Page (default: print it).")
    options = parser.parse_args()
    try:
        trials = [
            Trial(name, open_runs(options.root / name), open_runs(options.root / f"rates-{name}"))
            for name in options.task or ["short", "long"]
        ]
        text = write_page(trials, options.out.stem if options.out else "ablation-powered")
    except InputError as error:
        parser.error(str(error))
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
