"""Summarize where methods put the weight of recorded tokens.

This module writes a page, figures, and CSV files. ``trainer.atlas`` computes the weights, one step at a time. Within a
step, the weights of a method are divided by the mean of their absolute values, so that methods of any scale compare.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrace.analysis.runs import Runs
from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.places import reaching, to_place
from entrace.analysis.trace.staging import staged

if TYPE_CHECKING:
    import polars as pl

PAGE = "atlas.html"
MARK = '<meta name="generator" content="entrace atlas">'
METHODS, WEIGHTS, CORRELATIONS = "methods.csv", "weights.csv", "correlations.csv"
# The method that others are compared with.
PLAIN = "none"
# At ratio 1, and at the ratios after the update.
SAMPLED, AFTER = RATIOS = "sampled", "after"
NUM_BINS = 10
BINS: dict[str, list[str]] = {
    "position": [f"{i / NUM_BINS:g}–{(i + 1) / NUM_BINS:g}" for i in range(NUM_BINS)],
    "entropy": [f"{i + 1}" for i in range(NUM_BINS)],
    "sign": ["negative", "zero", "positive"],
}
TITLES = {
    "entropy": "Which entropies does each method weigh?",
    "position": "Which positions does each method weigh?",
    "sign": "Which sign of the advantage does each method weigh?",
    "category": "Which kinds of tokens does each method weigh?",
    "correlations": "Which methods rank tokens alike?",
}
# Remark on plain GRPO after the update.
REFERENCE = "after the update, for comparison with the methods below"
# Weights that differ less, relative to the mean absolute weight, are equal up to rounding.
TOLERANCE = 1e-6
# Tokens read at a time, or those of one step if it has more.
BLOCK_TOKENS = 200_000

STEPS = """
select step, count(*) as num_tokens, count(advantage) as num_advantages, count(entropy) as num_entropies
from tokens group by step order by step
"""
QUANTILES = """
select quantile_disc(entropy, [i / 10 for i in range(1, 10)]) as thresholds, list(distinct category) as categories
from tokens where is_kept is distinct from false
"""
RESPONSES = """
select step, rollout_id, group_id, is_correct, is_kept,
  reward + coalesce(length_penalty, 0) as reward
from rollouts where step between $first and $last order by step, rollout_id
"""
TOKENS = """
select step, rollout_id, position / response_length as position, category, advantage::double as advantage,
  logprob::double as logprob, entropy::double as entropy, (logprob_after - logprob)::double as log_ratio,
  entropy_after::double as entropy_after
from tokens where step between $first and $last order by step, rollout_id, tokens.position
"""


@dataclass(frozen=True)
class Trace:
    """Describe what a trace holds for the atlas.

    Attributes:
        run_id: The run.
        steps: Steps with tokens, with the numbers of their tokens and of recorded values.
        thresholds: The nine limits between deciles of entropy, nats; empty if entropy was not recorded.
        categories: Kinds of tokens.
    """

    run_id: str
    steps: pl.DataFrame
    thresholds: list[float]
    categories: list[str]

    @classmethod
    def of(cls, runs: Runs) -> Trace:
        """Examine a single run.

        Raises:
            InputError: several runs, or a run without tokens or without advantages.
        """
        if len(runs.manifests) != 1:
            names = ", ".join(list(runs.manifests)[:3])
            raise InputError(f"atlas: expected one run, found {len(runs.manifests)} ({names}, ...); name one of them")
        [(run_id, manifest)] = runs.manifests.items()
        steps = runs.run_shipped(STEPS)
        if steps.is_empty():
            raise InputError(f"{run_id}: no tokens are stored, and every method needs them; see record.token_steps")
        unknown = manifest.get("unknown") or {}
        if not steps["num_advantages"].sum():
            why = unknown.get("tokens.advantage", "record a run that is trained, or whose dump holds advantages")
            raise InputError(f"{run_id}: tokens.advantage has no values, which every method needs: {why}")
        [(thresholds, categories)] = runs.run_shipped(QUANTILES).rows()
        has_entropy = steps["num_entropies"].sum() and "tokens.entropy" not in unknown
        known = [category for category in categories if category is not None]
        return cls(run_id, steps, list(thresholds) if has_entropy else [], sorted(known))


def read_steps(runs: Runs, trace: Trace) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Yield the responses and tokens of each step, reading blocks of steps."""
    block: list[int] = []
    size = 0
    for step, num_tokens in trace.steps.select("step", "num_tokens").rows():
        if block and size + num_tokens > BLOCK_TOKENS:
            yield from _read_block(runs, block)
            block, size = [], 0
        block.append(step)
        size += num_tokens
    yield from _read_block(runs, block)


def _read_block(runs: Runs, steps: Sequence[int]) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    ends = {"first": steps[0], "last": steps[-1]}
    responses, tokens = (
        runs.run_shipped(text, ends).partition_by("step", as_dict=True, maintain_order=True)
        for text in (RESPONSES, TOKENS)
    )
    for step in steps:
        yield responses[step,], tokens[step,]


@dataclass
class Described:
    """A method in the summary.

    Attributes:
        name: The method.
        kind: Where it acts.
        equation: From its docstring.
        lacks: Why it cannot be weighed; empty if it can.
        acts_through_ratio: Whether it is weighed at the ratios after the update.
        passes: Optimizer steps per mini-batch.
        equals: Methods with the same weights up to a constant, earlier in the list.
        does_nothing: Whether its weights are those of plain GRPO, constant included.
        remark: The above in words.
    """

    name: str
    kind: str
    equation: str
    lacks: str = ""
    acts_through_ratio: bool = False
    passes: int = 1
    equals: list[str] = field(default_factory=list)
    does_nothing: bool = False
    remark: str = ""

    @property
    def at(self) -> str:
        """Ratios that it is weighed at."""
        return AFTER if self.acts_through_ratio else SAMPLED


class Tally:
    """Accumulate sums over all tokens in a few kilobytes, for any trace length."""

    def __init__(self, names: Sequence[str], trace: Trace) -> None:
        """Begin with empty sums."""
        self.names, self.trace = list(names), trace
        self.bins = {**BINS, "category": trace.categories}
        if not trace.thresholds:
            del self.bins["entropy"]
        count = len(self.names)
        self.sums = {
            at: {name: np.zeros((3, count, len(labels))) for name, labels in self.bins.items()} for at in RATIOS
        }
        self.tokens: dict[str, int] = dict.fromkeys(RATIOS, 0)
        self.correlation = {at: np.zeros((2, count, count)) for at in RATIOS}
        # Largest difference of normalized weights so far, and of weights to those of plain GRPO.
        self.apart = {at: np.zeros((count, count)) for at in RATIOS}
        self.from_plain = {at: np.zeros(count) for at in RATIOS}

    def codes(self, tokens: pl.DataFrame) -> dict[str, np.ndarray]:
        """Return the bin of each token in each dimension, (N,)."""
        advantage = tokens["advantage"].to_numpy()
        place = {category: i for i, category in enumerate(self.trace.categories)}
        found = {
            "position": np.minimum((tokens["position"].to_numpy() * NUM_BINS).astype(int), NUM_BINS - 1),
            "sign": np.sign(np.nan_to_num(advantage)).astype(int) + 1,
            "category": np.array([place.get(category, 0) for category in tokens["category"]], int),
        }
        if "entropy" in self.bins:
            found["entropy"] = np.searchsorted(self.trace.thresholds, tokens["entropy"].to_numpy(), side="right")
        return found

    def add(self, at: str, weights: Mapping[str, np.ndarray], codes: Mapping[str, np.ndarray]) -> None:
        """Add the weights of one step, (N,) by method, of tokens that all have a weight."""
        from scipy.stats import rankdata

        present = [i for i, name in enumerate(self.names) if name in weights]
        raw = np.stack([weights[self.names[i]] for i in present])
        scale = np.abs(raw).mean(1, keepdims=True)
        normal = np.divide(raw, scale, out=np.zeros_like(raw), where=scale > 0)
        self.tokens[at] += raw.shape[1]
        for name, code in codes.items():
            for i, row in zip(present, normal, strict=True):
                size = len(self.bins[name])
                sums = self.sums[at][name][:, i]
                sums[0] += np.bincount(code, minlength=size)
                sums[1] += np.bincount(code, np.abs(row), size)
                sums[2] += np.bincount(code, row, size)
        grid = np.ix_(present, present)
        ranks = rankdata(normal, axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        length = np.sqrt((ranks**2).sum(1))
        known = np.outer(length, length) > 0
        products = np.divide(ranks @ ranks.T, np.outer(length, length), out=np.zeros(known.shape), where=known)
        self.correlation[at][0][grid] += products * raw.shape[1]
        self.correlation[at][1][grid] += known * raw.shape[1]
        self._compare(at, present, raw, normal)

    def _compare(self, at: str, present: Sequence[int], raw: np.ndarray, normal: np.ndarray) -> None:
        apart = self.apart[at]
        for a, i in enumerate(present):
            for b in range(a):
                j = present[b]
                # Pairs that differ once need no further comparison.
                if apart[i, j] <= TOLERANCE:
                    apart[i, j] = apart[j, i] = max(apart[i, j], np.abs(normal[a] - normal[b]).max(initial=0))
        plain = raw[present.index(self.names.index(PLAIN))]
        unit = np.abs(plain).mean() or 1.0
        distance = np.abs(raw - plain).max(axis=1, initial=0) / unit
        self.from_plain[at][present] = np.maximum(self.from_plain[at][present], distance)


def describe(methods: Sequence[Described], tally: Tally) -> list[Described]:
    """Fill in what the weights show: methods that equal others, and that do nothing."""
    place = {name: i for i, name in enumerate(tally.names)}
    done: list[Described] = []
    for method in methods:
        if not method.lacks:
            for other in done:
                # Few tokens have values after the update; methods that are equal there may differ elsewhere.
                ats = {SAMPLED, method.at, other.at}
                if not other.lacks and all(
                    tally.apart[at][place[method.name], place[other.name]] <= TOLERANCE for at in ats
                ):
                    method.equals.append(other.name)
            method.does_nothing = bool(
                method.name != PLAIN and tally.from_plain[method.at][place[method.name]] <= TOLERANCE
            )
        method.remark = _remark(method)
        done.append(method)
    return done


def _remark(method: Described) -> str:
    if method.lacks:
        return f"not representable: {method.lacks}"
    parts = []
    if method.acts_through_ratio:
        parts.append("acts through the ratio; weighed after the update")
    if method.passes > 1:
        parts.append(f"acts through the order of its {method.passes} updates; weighed as their sum")
    if method.does_nothing:
        parts.append(f"{'does nothing' if method.passes == 1 else 'equal to none'}: the weights are those of none")
    elif method.equals:
        parts.append(f"equal up to a constant to {', '.join(method.equals)}")
    return "; ".join(parts)


def weights_frame(methods: Sequence[Described], tally: Tally) -> pl.DataFrame:
    """Return where the weight goes: one row per method, dimension, and bin.

    Plain GRPO has rows at both sets of ratios, since it is what both kinds of methods are compared with.
    """
    import polars as pl

    rows = []
    for method in methods:
        if method.lacks:
            continue
        place = tally.names.index(method.name)
        for at in [SAMPLED, AFTER] if method.name == PLAIN and tally.tokens[AFTER] else [method.at]:
            for dimension, labels in tally.bins.items():
                tokens, absolute, signed = tally.sums[at][dimension][:, place]
                for i, label in enumerate(labels):
                    share = absolute[i] / absolute.sum() if absolute.sum() else None
                    rows.append(
                        {
                            "method": method.name,
                            "at": at,
                            "dimension": dimension,
                            "bin": label,
                            "num_tokens": int(tokens[i]),
                            "token_share": tokens[i] / tokens.sum() if tokens.sum() else None,
                            "weight_share": share,
                            "mean_weight": signed[i] / tokens[i] if tokens[i] else None,
                        }
                    )
    return pl.DataFrame(rows, infer_schema_length=None)


def correlations_frame(methods: Sequence[Described], tally: Tally) -> pl.DataFrame:
    """Return Spearman's correlation of the weights for each pair of methods.

    Correlations are computed within steps and averaged over tokens.
    """
    import polars as pl

    shown = [method for method in methods if not method.lacks]
    rows = []
    for method in shown:
        for other in shown:
            at = AFTER if AFTER in (method.at, other.at) else SAMPLED
            total, count = tally.correlation[at][:, tally.names.index(method.name), tally.names.index(other.name)]
            rho = total / count if count else math.nan
            rows.append((method.name, other.name, at, None if math.isnan(rho) else rho, int(count)))
    return pl.DataFrame(
        rows, ["method", "other", "at", "spearman", "num_tokens"], orient="row", infer_schema_length=None
    )


def methods_frame(methods: Sequence[Described], weights: pl.DataFrame, correlations: pl.DataFrame) -> pl.DataFrame:
    """Return one row per method: what it does, and where its weight goes."""
    import polars as pl

    places = [(method, method.at) for method in methods if not method.lacks]
    places += [(method, AFTER) for method in methods if method.name == PLAIN and (weights["at"] == AFTER).any()]
    places.sort(key=lambda place: (place[1] == AFTER, place[1] == AFTER and place[0].name != PLAIN))
    rows = []
    for method, at in [*places, *((method, "") for method in methods if method.lacks)]:
        own = weights.filter(method=method.name, at=at)
        rho = correlations.filter(method=method.name, other=PLAIN)
        is_reference = method.name == PLAIN and at == AFTER
        rows.append(
            {
                **asdict(method),
                "equals": "" if is_reference else ", ".join(method.equals),
                "remark": REFERENCE if is_reference else method.remark,
                "at": at,
                "positive": _share(own, "sign", ["positive"]),
                "second_half": _share(own, "position", BINS["position"][NUM_BINS // 2 :]),
                "top_entropy": _share(own, "entropy", BINS["entropy"][-2:]),
                "spearman_with_none": rho["spearman"][0] if rho.height else None,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _share(weights: pl.DataFrame, dimension: str, labels: Sequence[str]) -> float | None:
    if not weights.height:
        return None
    rows = weights.filter(weights["dimension"] == dimension, weights["bin"].is_in(list(labels)))
    return float(rows["weight_share"].sum()) if rows.height else None


def write_atlas(
    runs: Runs,
    out: str | Path,
    compute: Callable[[Trace], tuple[list[Described], Tally]],
) -> tuple[Path, pl.DataFrame]:
    """Write the page, its figures (PNG, PDF), and three CSV files.

    Args:
        runs: The run.
        out: Folder that is new, empty, or holds an earlier atlas, which is replaced.
        compute: Weighs the tokens of the run.

    Returns:
        Path of the page, and the summary of the methods.

    Raises:
        InputError: ``out`` holds something other than an atlas, or the run lacks what every method needs.
    """
    from entrace.analysis.figures import atlas as figures
    from entrace.analysis.report import check_target, picture_files, render
    from entrace.analysis.terminal.export import to_report_csv

    out = to_place(out)
    with reaching(out):
        check_target(out, PAGE, MARK)
    trace = Trace.of(runs)
    methods, tally = compute(trace)
    methods = describe(methods, tally)
    weights, correlations = weights_frame(methods, tally), correlations_frame(methods, tally)
    summary = methods_frame(methods, weights, correlations)
    replaces = [f"{stem}.{form}" for stem in TITLES for form in ("png", "pdf")]
    with staged(out, last=PAGE, replaces=replaces) as folder:
        for name, frame in ((METHODS, summary), (WEIGHTS, weights), (CORRELATIONS, correlations)):
            (folder / name).write_text(to_report_csv(frame), encoding="utf-8")
        sections = []
        for stem, title in TITLES.items():
            if stem not in tally.bins and stem != "correlations":
                continue
            files = picture_files(figures.drawn(stem, summary, weights, correlations))
            for form, data in files.items():
                (folder / f"{stem}.{form}").write_bytes(data)
            data = CORRELATIONS if stem == "correlations" else WEIGHTS
            image = base64.b64encode(files["png"]).decode()
            sections.append(
                {"stem": stem, "title": title, "caption": figures.CAPTIONS[stem], "image": image, "data": data}
            )
        page = render(
            "atlas.html.jinja",
            mark=MARK,
            title=f"entrace atlas: {trace.run_id}",
            run_id=trace.run_id,
            notes=list(runs.notes.values()),
            methods=summary.to_dicts(),
            tokens=tally.tokens,
            num_steps=trace.steps.height,
            has_entropy=bool(trace.thresholds),
            sections=sections,
            files=[METHODS, WEIGHTS, CORRELATIONS],
        )
        (folder / PAGE).write_text(page, encoding="utf-8")
    return out / PAGE, summary
