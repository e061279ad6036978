"""Arms beside each other: their means over seeds, and a panel for each where there are many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.effects.estimate import MIN_RUNS
from analysis.figures import style
from analysis.stats import CONFIDENCE

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes

    from analysis.runs import Runs

COLUMNS = 4
# Shares of a panel's width and height that are left free, to its right and above it.
GAP_X, GAP_Y = 0.06, 0.24
# Inches: a row of panels, a row of names, and what lies around them.
PANEL_HEIGHT, ROW_HEIGHT, MARGIN = 1.05, 0.16, 1.0
# Points between panels that share an axis label and that label: room for the numbers along their edges.
X_PAD, Y_PAD = 15, 25


def with_means(runs: Runs, frame: pl.DataFrame, value: str, keys: Sequence[str]) -> pl.DataFrame:
    """Adds to every run's row the ``baseline`` of its arm and the arm's mean of ``value`` at equal ``keys``.

    Columns ``mean``, ``mean_low``, ``mean_high`` (95 % interval) and ``num_seeds``. The interval is Student's t over
    runs if there are ``MIN_RUNS``; else it is over prompts, as wide as those of the single runs, and leaves out how
    other seeds would turn out. They are null for a run that was not evaluated as far as others of its arm, if last
    evaluations are averaged, and for metrics that are no shares.

    Args:
        runs: Says which arm each is compared with.
        frame: Rows of runs with ``run_id``, ``arm``, ``benchmark``, ``step``, ``low``, ``high``, ``value``, ``keys``.
        value: Column of shares, in [0, 1].
        keys: What must be equal, apart from the arm.
    """
    import polars as pl

    baselines = {run: manifest.get("baseline") or runs.baseline for run, manifest in runs.manifests.items()}
    frame = frame.with_columns(
        arm=pl.col("arm").fill_null("-"),
        baseline=pl.col("run_id").replace_strict(baselines, default=runs.baseline, return_dtype=pl.String),
    )
    part = frame.drop_nulls(value)
    if "step" not in keys:
        part = part.filter(pl.col("step") == pl.col("step").max().over("arm", "benchmark"))
    group = list(dict.fromkeys(("arm", "step", *keys)))
    if "metric" in keys:
        part = part.filter(pl.col("metric").str.ends_with("_at_k"))
    # Where one end is cut off at 0 or 1, the other tells how far the interval reaches.
    reach = pl.max_horizontal(pl.col(value) - pl.col("low"), pl.col("high") - pl.col(value))
    means = part.group_by(group).agg(
        mean=pl.col(value).mean(),
        reach=reach.mean(),
        error=pl.col(value).std() / pl.len().sqrt(),
        num_seeds=pl.len().cast(pl.Int64),
    )
    over_seeds = pl.col("error") * pl.col("num_seeds").replace_strict(_student(means["num_seeds"]))
    half = pl.when(pl.col("num_seeds") < MIN_RUNS).then("reach").otherwise(over_seeds)
    means = means.select(
        *group,
        "mean",
        "num_seeds",
        mean_low=(pl.col("mean") - half).clip(0, 1),
        mean_high=(pl.col("mean") + half).clip(0, 1),
    )
    return frame.join(means, on=group, how="left", maintain_order="left")


def _student(num_seeds: pl.Series) -> dict[int, float]:
    """Half an interval in standard errors, by number of runs."""
    from scipy import stats

    return {n: float(stats.t.ppf((1 + CONFIDENCE) / 2, max(n - 1, 1))) for n in num_seeds.unique()}


def names(frame: pl.DataFrame) -> list[str]:
    """Arms, baselines first."""
    arms = frame["arm"].unique(maintain_order=True).to_list()
    return sorted(arms, key=lambda arm: arm not in set(frame["baseline"]))


def mean_rows(frame: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """One row per arm and ``keys``: mean and interval, as ``style`` draws them."""
    return (
        frame.drop_nulls("mean")
        .unique(["arm", *keys], keep="first", maintain_order=True)
        .drop("low", "high")
        .rename({"mean_low": "low", "mean_high": "high"})
    )


def covers(frame: pl.DataFrame) -> str:
    """What the intervals of ``with_means`` cover."""
    seeds = frame["num_seeds"].drop_nulls()
    if seeds.is_empty() or seeds.max() < MIN_RUNS:  # pyright: ignore[reportOperatorIssue]
        return "95 % interval over prompts"
    return "95 % interval over seeds" + (f", over prompts below {MIN_RUNS}" if (seeds < MIN_RUNS).any() else "")


def counts(frame: pl.DataFrame) -> str:
    """Arms, seeds, prompts and samples behind means, in words."""
    prompts, samples = style.span(frame["num_prompts"]), style.span(frame["k"])
    number = style.count(names(frame), "arm")
    return f"{number}, {seeds(frame)} each, {prompts} held-out prompts, {samples} samples each"


def seeds(frame: pl.DataFrame) -> str:
    """``1 seed`` or ``3-5 seeds``."""
    found = frame["num_seeds"].drop_nulls()
    return f"{style.span(found)} seed{'s' * (found.to_list() != [1] * len(found))}"


def is_crowded(frame: pl.DataFrame) -> bool:
    """Whether the arms are too many for a colour each."""
    return len(names(frame)) > len(style.ARM_COLORS)


def panels_size(frame: pl.DataFrame) -> tuple[float, float]:
    """Size of a figure of ``lines``: grows in height with the panels it needs."""
    width, height = style.SIZE
    rows = -(-len(_compared(frame)) // COLUMNS)
    return (width, MARGIN + rows * PANEL_HEIGHT) if is_crowded(frame) else (width, height)


def rows_size(num_rows: int) -> tuple[float, float]:
    """Size of a figure with a line of text for every arm."""
    width, height = style.SIZE
    return width, max(height, MARGIN + num_rows * ROW_HEIGHT)


def lines(ax: Axes, frame: pl.DataFrame, x: str, legend: str) -> None:
    """Draws every arm's mean with its band over ``x``: a colour each, or, if they are many, a panel each.

    A panel shows its arm in blue and, in grey, the arm that it is compared with. Benchmarks differ in line style.
    """
    means = mean_rows(frame, "benchmark", x)
    if not is_crowded(frame):
        for arm, color in zip(names(means), style.ARM_COLORS, strict=False):
            _line(ax, means.filter(arm=arm), x, color, style.shorten(arm))
        style.legend(ax, loc=legend)
        return
    shown = _compared(means)
    for arm, panel in zip(shown, panels(ax, len(shown)), strict=True):
        own = means.filter(arm=arm)
        _line(panel, means.filter(arm=own["baseline"][0]), x, style.GREY)
        _line(panel, own, x, style.BLUE)
        # The values of a sweep go on a line of their own.
        panel.set_title(style.shorten(arm).replace(" [", "\n["), fontsize=6.5, pad=2)


def line_note(frame: pl.DataFrame) -> str:
    """What lines and bands of ``lines`` are."""
    benchmarks = frame["benchmark"].drop_nulls().unique(maintain_order=True).to_list()
    styles = zip(benchmarks, ("solid", "dashed", "dotted", "dash-dotted"), strict=False)
    which = "; " + ", ".join(f"{line}: {style.shorten(name)}" for name, line in styles) if len(benchmarks) > 1 else ""
    plain = "; grey: the arm compared with" if is_crowded(frame) else ""
    return f"{counts(frame)}\nband: {covers(frame)}{which}{plain}"


def panels(ax: Axes, count: int) -> list[Axes]:
    """Replaces the inside of ``ax`` by ``count`` panels with common axes, row by row; ``ax`` keeps labels and title."""
    import matplotlib as mpl

    hide(ax)
    ax.xaxis.labelpad, ax.yaxis.labelpad = X_PAD, Y_PAD
    height = 1 / -(-count // COLUMNS)
    width = 1 / (COLUMNS - GAP_X)
    found: list[Axes] = []
    with mpl.rc_context(style.RC):
        for i in range(count):
            row, column = divmod(i, COLUMNS)
            bounds = (column * width, 1 - (row + 1) * height, width * (1 - GAP_X), height * (1 - GAP_Y))
            shared: dict[str, Any] = {"sharex": found[0], "sharey": found[0]} if found else {}
            panel = ax.inset_axes(bounds, **shared)
            panel.tick_params(labelsize=6.5, labelleft=column == 0, labelbottom=i + COLUMNS >= count, length=2, pad=2)
            panel.locator_params(nbins=4)
            found.append(panel)
    return found


def hide(ax: Axes) -> None:
    """Leaves of ``ax`` its labels and its title."""
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def seed_dots(ax: Axes, x: Sequence[float] | pl.Series, y: Sequence[float], color: str, **options: Any) -> None:
    """Draws single runs as small open dots that a mean under them shows through."""
    ax.plot(
        x,
        y,
        marker="o",
        markersize=2.2,
        markerfacecolor="white",
        markeredgecolor=color,
        markeredgewidth=0.5,
        linestyle="none",
        **options,
    )


def name_width(order: Sequence[str]) -> float:
    """Share of the width of a column that the longest of the names takes."""
    return 0.01 + 0.0108 * max(len(style.shorten(name)) for name in order)


def _compared(frame: pl.DataFrame) -> list[str]:
    """Arms that are compared with another one; all of them if none is."""
    baselines = set(frame["baseline"])
    return [arm for arm in names(frame) if arm not in baselines] or names(frame)


def _line(ax: Axes, means: pl.DataFrame, x: str, color: str, name: str | None = None) -> None:
    for i, (benchmark, line) in enumerate(
        zip(means.partition_by("benchmark", maintain_order=True), style.RUN_STYLES, strict=False)
    ):
        style.band(ax, benchmark.sort(x), x, "mean", color=color, linestyle=line, label=None if i else name)
