"""Test moderated errors against closed forms and a naive fit, and by coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from entrace.analysis.compare.moderate import moderate
from entrace.analysis.compare.paired import PROMPTS_AND_SEEDS, Difference, over_seeds
from entrace.analysis.compare.rows import Row, SeedValue
from entrace.analysis.statistics.estimates import Estimate, holm, moderated_variances

SIMULATIONS = 200


def row(arm: str, differences: Sequence[float], shared_variance: float = 0.0, metric: str = "avg_at_k") -> Row:
    seeds = [SeedValue(seed, None, None, float(value)) for seed, value in enumerate(differences)]
    own = over_seeds(np.array(differences))
    difference = Difference(own.estimate, PROMPTS_AND_SEEDS, shared_variance)
    return Row(arm, "none", "b", metric, "accuracy", seeds, difference=difference)


def errors(rows: Sequence[Row]) -> list[tuple[float, float]]:
    return [(row.difference.estimate.error, row.difference.estimate.df) for row in rows if row.difference]


@pytest.mark.parametrize("shared", [0.0, 0.0004])
def test_one_arm_is_the_paired_t_test(shared: float):
    differences = [0.03, -0.01, 0.02, 0.05]
    found = moderate([row("ppl", differences, shared)])[0].difference
    assert found
    error = np.sqrt(np.var(differences, ddof=1) / 4 + shared)
    estimate = found.estimate
    assert (estimate.error, estimate.df) == (pytest.approx(error), pytest.approx(3))
    assert estimate == Estimate.from_error(estimate.value, estimate.error, estimate.df, 4, "seeds")


def residual_variances(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return residual variances of a full table.

    A residual is y - arm mean - seed mean + grand mean.
    """
    residuals = runs - runs.mean(1, keepdims=True) - runs.mean(0) + runs.mean()
    num_arms, num_seeds = runs.shape
    df = np.full(num_arms, (num_seeds - 1) * (num_arms - 1) / num_arms)
    return (residuals**2).sum(1) / df, df


def test_balanced_arms_against_the_two_way_table():
    # With this seed, the variances of all arms agree.
    rng = np.random.default_rng(19)
    runs = rng.normal(0, 0.02, (5, 4)) + rng.normal(0, 0.1, 4)
    variances, df = moderated_variances(*residual_variances(runs))
    found = errors(moderate([row(f"arm{a}", runs[a] - runs[0]) for a in range(1, 5)]))
    for a in range(1, 5):
        expected = np.sqrt((variances[a] + variances[0]) / 4), min(df[a], df[0])
        assert found[a - 1] == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_a_variable_arm_keeps_its_own_variance_and_does_not_affect_the_others():
    # With this seed, the variances of all other arms agree.
    rng = np.random.default_rng(19)
    runs = rng.normal(0, 0.02, (5, 4))
    runs[4] *= 20
    runs += rng.normal(0, 0.1, 4)
    own, own_df = residual_variances(runs)
    variances, df = moderated_variances(*residual_variances(runs[:4]))
    found = errors(moderate([row(f"arm{a}", runs[a] - runs[0]) for a in range(1, 5)]))
    for a in range(1, 4):
        assert found[a - 1] == (pytest.approx(np.sqrt((variances[a] + variances[0]) / 4)), pytest.approx(df[a]))
    assert found[3] == (pytest.approx(np.sqrt((own[4] + variances[0]) / 4)), pytest.approx(own_df[4]))


def test_arms_of_few_seeds_gain_and_the_noisy_one_stays_noisy():
    rng = np.random.default_rng(1)
    runs = rng.normal(0, 0.02, (12, 5))
    runs[11] *= 10
    rows = [row(f"arm{a}", (runs[a] - runs[0])[: 3 if a > 6 else 5]) for a in range(1, 12)]
    found = errors(moderate(rows))
    # An arm in five keeps its own degrees of freedom by chance.
    assert sum(df > 20 for _, df in found[:10]) >= 7
    assert found[10][1] < 4
    assert found[10][0] > 3 * max(error for error, _ in found[:10])


def test_rows_without_an_error_do_not_affect_the_others():
    """Use one seed, equal differences, and no difference.

    Another metric is another family.
    """
    lone, equal, other = row("a", [0.1]), row("b", [0.1, 0.1, 0.1]), row("d", [0.1, 0.3], metric="entropy")
    nothing = Row("c", "none", "b", "avg_at_k", "accuracy")
    rows = [lone, equal, nothing, row("e", [0.1, 0.2, 0.0]), other]
    found = moderate(rows)
    assert found[:3] == rows[:3]
    assert errors(found)[2] == (pytest.approx(0.1 / 3**0.5), pytest.approx(2))
    assert errors(found)[3] == (pytest.approx(0.1), pytest.approx(1))


def test_equal_variances_are_pooled_and_different_ones_kept_apart():
    pooled, df = moderated_variances(np.array([1.0, 1.1, 0.9]), np.array([4.0, 4.0, 2.0]))
    assert pooled == pytest.approx((1.0 * 4 + 1.1 * 4 + 0.9 * 2) / 10)
    assert df == pytest.approx(10)
    rng = np.random.default_rng(2)
    # True variances scatter as 4 x .5 / chi^2_4: d_0 = 4 and v_0 = .5 should be found.
    seen = 2.0 / rng.chisquare(4, 20_000) * rng.chisquare(6, 20_000) / 6
    moderated, df = moderated_variances(seen, np.full(20_000, 6.0))
    assert df == pytest.approx(10, rel=0.03)
    np.testing.assert_allclose(moderated, (4 * 0.5 + 6 * seen) / 10, rtol=0.03)


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("num_arms", [4, 28])
def test_coverage_false_rejections_and_power(num_arms: int, spread: float):
    """Simulate arms with five or three seeds, one of them truly .06 better.

    The noise is .015 and varies by arm.
    """
    rng = np.random.default_rng(num_arms)
    seeds = [5 if a <= num_arms // 3 else 3 for a in range(num_arms)]
    covered, false, found = [], [], {"moderated": [], "alone": []}
    for _ in range(SIMULATIONS):
        runs = rng.normal(0, 0.015 * np.exp(spread * rng.normal(size=(num_arms, 1))), (num_arms, 5))
        runs += rng.normal(0, 0.03, 5)
        runs[-1] += 0.06
        rows = [row(f"arm{a}", (runs[a] - runs[0])[: seeds[a]]) for a in range(1, num_arms)]
        estimates = [r.difference.estimate for r in moderate(rows) if r.difference]
        covered += [e.low <= 0.06 * (a == num_arms - 2) <= e.high for a, e in enumerate(estimates)]
        adjusted = holm([e.p_value for e in estimates])
        false.append((adjusted[:-1] <= 0.05).any())
        found["moderated"].append(adjusted[-1] <= 0.05)
        alone = holm([r.difference.estimate.p_value for r in rows if r.difference])
        found["alone"].append(alone[-1] <= 0.05)
    assert 0.93 <= np.mean(covered) <= 0.98
    # At most the 99th percentile of the number of false rejections at a rate of .05.
    assert np.sum(false) <= stats.binom.ppf(0.99, SIMULATIONS, 0.05)
    assert np.mean(found["moderated"]) > 1.5 * np.mean(found["alone"])


@pytest.mark.parametrize(("num_arms", "num_seeds"), [(4, 3), (4, 5), (12, 3)])
def test_an_arm_four_times_as_variable_keeps_its_coverage(num_arms: int, num_seeds: int):
    rng = np.random.default_rng(num_arms)
    variable, others = [], []
    for _ in range(2 * SIMULATIONS):
        runs = rng.normal(0, 0.015, (num_arms, num_seeds))
        runs[1] *= 4
        runs += rng.normal(0, 0.03, num_seeds)
        rows = moderate([row(f"arm{a}", runs[a] - runs[0]) for a in range(1, num_arms)])
        covered = [r.difference.estimate.low <= 0 <= r.difference.estimate.high for r in rows if r.difference]
        variable.append(covered[0])
        others += covered[1:]
    for hits in (variable, others):
        assert 0.92 <= np.mean(hits) <= 0.985
