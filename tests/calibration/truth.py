"""Compute the true size of each effect in a world.

The size is in closed form, or comes from plain numpy on many simulated runs. The numpy code is an independent reference
that shares neither SQL nor statistics with the toolkit. States of the policy are drawn without autocorrelation, which
keeps their distribution and averages them out faster.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from tests.calibration.parameters import LENGTHS, MethodWorld, UpdateWorld, World, curve
from tests.calibration.simulate import SPECIAL_SHARE, Run, Tokens, simulate_run, terciles
from tests.calibration.simulate_updates import UpdateRun, simulate_updates

TRUTH_RUNS = 40
EXCHANGE_RUNS = 200
MIN_MOBILITY, STILL = 0.001, 0.01
# Changes between evaluations that a correlation needs.
MIN_CHANGES = 20
# A change below this share of the larger half is rounding.
STANDSTILL = 1e-9

# By ``claim/part``.
Truth = dict[str, float]


def truth_of(world: World | MethodWorld | UpdateWorld, rng: np.random.Generator, num_runs: int = TRUTH_RUNS) -> Truth:
    """Return the truth of every part of the ledger that has one."""
    if isinstance(world, UpdateWorld):
        return _forecasts(world, rng, 5 * num_runs)
    if isinstance(world, MethodWorld):
        return {
            **dict.fromkeys(("M1/avg@k", "M2/avg@k", "I3/avg@k"), world.accuracy),
            "M3/length": world.length,
            "M3/formal tokens": world.formal,
        }
    truth = {**_halves(world), **_exchange(world, rng, 5 * num_runs)}
    if not world.has_responses:
        return truth
    truth |= {**_changes(world), **_relative_falls(world, rng, num_runs)}
    if _changes_over_training(world) and not world.boundary:
        return truth
    levels: dict[str, list[float]] = defaultdict(list)
    for _ in range(num_runs):
        for part, value in _levels(simulate_run(replace(world, rho=0.0), rng), rng).items():
            levels[part].append(value)
    return truth | {part: float(np.mean(values)) for part, values in levels.items()}


def _changes_over_training(world: World) -> bool:
    return world.course != "flat"


def _halves(world: World) -> Truth:
    """Return (v1 - |v2|) / (|v1| + |v2|) of the mean course (S1).

    The result is empty if lengths affect the course.
    """
    if world.growth or world.wrong_length or (world.hard_entropy and world.negative_entropy != world.positive_entropy):
        return {}
    entropy, accuracy = _mean_courses(world)
    truth = {}
    for part, values in (("S1/entropy slows", -entropy), ("S1/accuracy slows", accuracy)):
        start, end = values[0], values[-1]
        middle = np.interp((world.steps - 1) / 2, np.arange(world.steps), values)
        first, second = middle - start, end - middle
        size = abs(first) + abs(second)
        value = float((first - abs(second)) / size) if size > STANDSTILL else -1.0
        # No interval excludes a truth at the end of the scale.
        if abs(value) < 1 - STANDSTILL:
            truth[part] = value
    return truth


def _mean_courses(world: World) -> tuple[np.ndarray, np.ndarray]:
    accuracy = curve(world.accuracy, world, world.accuracy_course)
    negative, positive = curve(world.negative_entropy, world), curve(world.positive_entropy, world)
    return (1 - accuracy) * negative + accuracy * positive, accuracy


def _exchange(world: World, rng: np.random.Generator, num_runs: int) -> Truth:
    """Return the slope given a linear trend, and the fit of the mean course (E1).

    The noise of the groups is excluded. Drift of the policy counts, as in a recorded run.
    """
    if not _changes_over_training(world):
        return {"E1/association": 0.0}
    entropy, accuracy = _mean_courses(world)
    basis = np.column_stack((-np.exp(entropy), np.ones(world.steps)))
    residual = accuracy - basis @ np.linalg.lstsq(basis, accuracy, rcond=None)[0]
    fit = 1 - residual.var() / accuracy.var()
    trend = np.column_stack((np.ones(world.steps), np.linspace(-1, 1, world.steps)))
    product = square = 0.0
    for _ in range(num_runs):
        run = simulate_run(replace(world, has_tokens=False), rng)
        tokens, total = run.by_group(run.length), run.by_group(run.length * run.entropy)
        right = run.by_group(run.is_correct)
        x = [-np.exp(total[:, half::2].sum((1, 2)) / tokens[:, half::2].sum((1, 2))) for half in (0, 1)]
        y = [right[:, half::2].mean((1, 2)) for half in (0, 1)]
        x0, x1, y0, y1 = (values - trend @ np.linalg.lstsq(trend, values, rcond=None)[0] for values in (*x, *y))
        product += x0 @ y1 + x1 @ y0
        square += 2 * (x0 @ x1)
    return {"E1/association": float(product / square), "E1/fit": float(fit - 0.9)}


def _changes(world: World) -> Truth:
    """Return the truths of S3, S4, and interventions in closed form."""
    truth = {"S4/any defect": world.defects[0] - world.defects[1]}
    if world.has_tokens:
        change = world.reasoning[1] - world.reasoning[0]
        truth |= {"S3/reasoning": change, "S3/other words": (1 - SPECIAL_SHARE) * change}
    if world.has_interventions:
        truth |= {"I2/impact": world.impact_by_ppl, "T2/impact": world.impact_slope * _half_distance()}
    return truth if world.boundary or not _changes_over_training(world) else {k: v for k, v in truth.items() if v == 0}


def _half_distance() -> float:
    """Return mean relative position of the second half minus the first.

    Positions are drawn uniformly.
    """
    places = [(np.arange(length) / length, np.full(length, 1 / length)) for length in LENGTHS]
    place, weight = (np.concatenate(parts) for parts in zip(*places, strict=True))
    late = place >= 0.5
    return float(np.average(place[late], weights=weight[late]) - np.average(place[~late], weights=weight[~late]))


def _relative_falls(world: World, rng: np.random.Generator, num_runs: int) -> Truth:
    """Return ln(start / end) of negative minus positive entropy (S2).

    The ratio covers the rising stage or the run. Correct and incorrect responses to the same prompts are compared, so
    properties of the prompt have no effect. With tokens, whose entropy is bounded, means fall short of the course. The
    ratio then comes from simulated runs, with all groups of a step pooled and a cubic fitted over steps.
    """
    ratio = np.log(curve(world.negative_entropy, world) / curve(world.positive_entropy, world))
    end = world.boundary or world.steps
    fall = float(ratio[0] - ratio[end - 1])
    if world.has_tokens and abs(fall) > STANDSTILL:
        sums = np.zeros((2, world.steps))
        for _ in range(num_runs):
            run = simulate_run(replace(world, rho=0.0), rng)
            right, level = run.by_group(run.is_correct), run.by_group(run.entropy)
            mixed = right.any(2) & ~right.all(2)
            for i, kind in enumerate((~right, right)):
                means = (level * kind).sum(2) / np.maximum(kind.sum(2), 1)
                sums[i] += (means * mixed).sum(1)
        step = np.arange(end)
        fitted = np.polyval(np.polyfit(step, np.log(sums[0] / sums[1])[:end], 3), step[[0, -1]])
        fall = float(fitted[0] - fitted[1])
    return dict.fromkeys(("S2/mainly negative", "S2/same prompt"), fall if abs(fall) > STANDSTILL else 0.0)


def _levels(run: Run, rng: np.random.Generator) -> Truth:
    """Return the truths measured over the plateau.

    If nothing changes, they cover the whole run.
    """
    in_plateau = run.step > run.world.boundary
    truth = {"I1/accuracy": _half_difference(run, in_plateau)}
    if run.tokens is None:
        return truth
    chosen = in_plateau & run.is_kept
    return {
        **truth,
        "I1/reasoning tokens": _reasoning_difference(run, run.tokens, in_plateau),
        **_ends(run, run.tokens, chosen),
        **_movement(run, run.tokens, rng),
        **_entropy_laws(run, run.tokens),
    }


def at_equal_length(run: Run, in_plateau: np.ndarray) -> np.ndarray:
    """Return surprisal at equal log length within groups, of the plateau.

    Shape ``(groups, responses)``.
    """
    keep = run.by_group(in_plateau)[..., 0]
    x, y = np.log(run.by_group(run.length)[keep]), run.by_group(run.surprisal)[keep]
    x, y = (values - values.mean(1, keepdims=True) for values in (x, y))
    return y - (x * y).sum() / (x * x).sum() * x


def _half_difference(run: Run, in_plateau: np.ndarray) -> float:
    """Return accuracy of the low-perplexity half minus that of the high half.

    Only mixed groups count.
    """
    right = run.by_group(run.is_correct)[run.by_group(in_plateau)[..., 0]]
    mixed = right.any(1) & ~right.all(1)
    order = at_equal_length(run, in_plateau)[mixed].argsort(1)
    ordered = np.take_along_axis(right[mixed], order, 1)
    half = run.world.group // 2
    return float(ordered[:, :half].mean() - ordered[:, -half:].mean())


def _high(values: np.ndarray) -> np.ndarray:
    return values >= np.quantile(values, 0.8)


def _reasoning_difference(run: Run, tokens: Tokens, in_plateau: np.ndarray) -> float:
    """Return the excess share of reasoning tokens, low minus high third.

    The excess is over the share at equal position.
    """
    tercile = np.zeros(len(run.step), dtype=int)
    tercile[in_plateau] = terciles(at_equal_length(run, in_plateau)[None])
    at = np.flatnonzero((in_plateau & run.is_kept)[tokens.row])
    at = at[_high(tokens.entropy[at])]
    row = tokens.row[at]
    tenth = tokens.position[at] * 10 // run.length[row]
    reasoning = tokens.is_reasoning[at].astype(float)
    expected = np.bincount(tenth, weights=reasoning) / np.bincount(tenth)
    excess = reasoning - expected[tenth]
    return float(excess[tercile[row] == 1].mean() - excess[tercile[row] == 3].mean())


def _ends(run: Run, tokens: Tokens, chosen: np.ndarray) -> Truth:
    """Return entropy of the first and last fifth relative to the middle (T1).

    Responses are weighted equally.
    """
    fifth = tokens.position * 5 // run.length[tokens.row]
    means = []
    for part in (fifth == 0, fifth == 4, (fifth > 0) & (fifth < 4)):
        size = len(run.step)
        count = np.bincount(tokens.row[part], minlength=size)
        total = np.bincount(tokens.row[part], weights=tokens.entropy[part], minlength=size)
        means.append((total[chosen] / count[chosen]).mean())
    return {"T1/beginning": means[0] / means[2] - 1, "T1/end": means[1] / means[2] - 1}


def _movement(run: Run, tokens: Tokens, rng: np.random.Generator) -> Truth:
    """Return the truths of S5, S6, and T3 over captured tokens of the plateau."""
    if run.world.update in ("none", "float32", "bf16"):
        return {}
    at = np.flatnonzero((run.step > run.world.boundary)[tokens.row] & np.isfinite(tokens.logprob_after))
    row, before, after = tokens.row[at], tokens.logprob[at], tokens.logprob_after[at]
    p, dp = np.exp(before), np.exp(after) - np.exp(before)
    size, mobility = np.abs(dp), p * (1 - p)
    step = run.step[row]
    by_step = np.array([_against_random(p[step == i], size[step == i], rng) for i in np.unique(step)]).mean(0)
    truth = {"S5/concentration": float(by_step[0]), "S5/hardly move": float(by_step[1])}
    entropy, grad_norm = tokens.entropy[at], tokens.grad_norm[at]
    in_update = (run.is_kept & (run.step > run.world.boundary))[tokens.row]
    is_high = entropy >= np.quantile(tokens.entropy[in_update], 0.8)
    can_move = mobility >= MIN_MOBILITY
    is_steep = grad_norm >= np.quantile(grad_norm[can_move], 0.8)
    for part, chosen in (("S6/high entropy", is_high), ("S6/large gradient", is_steep)):
        kind, rest = can_move & chosen, can_move & ~chosen
        truth[part] = float(size[kind].sum() / mobility[kind].sum() / (size[rest].sum() / mobility[rest].sum()) - 1)
    sign = np.sign(run.advantage)[row]
    turn = dp[is_high & (sign > 0)].mean() - dp[is_high & (sign < 0)].mean()
    truth["S6/direction"] = float(turn / size[is_high].mean())
    place = tokens.position[at] * 5 // run.length[row]
    end, middle = is_high & (place == 4), is_high & (place > 0) & (place < 4)
    bins = np.searchsorted(np.quantile(entropy[end | middle], np.linspace(0, 1, 11)[1:-1]), entropy)
    for part, values in (("T3/movement", size), ("T3/gradient", grad_norm)):
        truth[part] = _at_equal(values, bins, end, middle)
    return truth


def _entropy_laws(run: Run, tokens: Tokens) -> Truth:
    """Return the truths of E2, E3, and E4 over all captured tokens."""
    if run.world.update in ("none", "float32", "bf16"):
        return {}
    in_update = run.is_kept[tokens.row]
    at = np.flatnonzero(np.isfinite(tokens.logprob_after) & in_update)
    row, logprob, entropy = tokens.row[at], tokens.logprob[at], tokens.entropy[at]
    step, advantage, p = run.step[row], run.advantage[row], np.exp(logprob)
    # Means of the batch, which includes responses whose tokens are not captured.
    size = np.bincount(run.step[tokens.row][in_update], minlength=run.world.steps + 1)
    mean_logprob, mean_advantage = (
        (np.bincount(run.step[tokens.row][in_update], values[in_update], run.world.steps + 1) / np.maximum(size, 1))[
            step
        ]
        for values in (tokens.logprob, run.advantage[tokens.row])
    )
    change, shift = tokens.entropy_after[at] - entropy, tokens.logprob_after[at] - logprob
    surprise = entropy + logprob
    predictions = {
        "covariance": -(logprob - mean_logprob) * (advantage - mean_advantage),
        "discriminator": -advantage * p * surprise,
        "omega": -advantage * (1 - p) ** 2 * surprise,
        "quadrants": -np.sign(advantage) * np.where(p > 0.5, 1, -1),
    }
    odds = np.floor(2 * np.clip(logprob - np.log(np.maximum(1 - p, 1e-12)), -40, 40))
    level = np.floor(2 * np.log(np.maximum(entropy, 1e-6)))
    keys = {"": (step,), "shuffle": (step, np.sign(advantage), odds), "random": (step, odds, level)}
    cells = {name: _number(*key) for name, key in keys.items()}

    def correlations(prediction: np.ndarray, measured: np.ndarray) -> dict[str, float]:
        found = {}
        for name, cell in cells.items():
            x, y = (_from_mean(values, cell) for values in (prediction, measured))
            found[name] = float(x @ y / np.sqrt((x @ x) * (y @ y)))
        return found

    def nearer(first: float, second: float) -> float:
        low, high = sorted((first, second))
        return 0.0 if low <= 0 <= high else low if low > 0 else high

    explained = correlations(entropy, change)[""] ** 2
    with np.errstate(invalid="ignore"):
        found = {name: correlations(prediction, change) for name, prediction in predictions.items()}
    truth = {f"E3/{name}": values[""] * abs(values[""]) - explained for name, values in found.items()}
    truth |= {f"E2/{name}": nearer(values["shuffle"], values["random"]) for name, values in found.items()}
    truth["E2/quadrants"] = found["quadrants"]["random"]
    gradient = np.sign(advantage) * tokens.grad_norm[at] ** 2 / np.abs(advantage)
    own = correlations(gradient, shift)
    return truth | {"E4/own gradient": nearer(own["shuffle"], own["random"])}


def _forecasts(world: UpdateWorld, rng: np.random.Generator, num_runs: int) -> Truth:
    """Return the partial correlation of forecast and measured changes (E5).

    Predictors that need no formula are partialled out. The correlation is a mean of Fisher's z over runs, and 0 unless
    updates depend on the advantage of each token. Runs with few evaluations have none.
    """
    if world.steps // world.eval_every < MIN_CHANGES:
        return {}
    if world.update not in ("gradient", "against"):
        return dict.fromkeys((f"E5/{name}" for name in ("covariance", "discriminator", "omega", "quadrants")), 0.0)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(num_runs):
        run = simulate_updates(world, rng)
        forecasts = forecasts_of(run)
        size = forecasts.pop("size")
        entropy = run.heldout.mean(1)[:: world.eval_every]
        change = np.diff(entropy)
        time = np.linspace(0, 1, len(change))
        number = len(change) // 10
        bends = [np.clip(time - (i + 1) / (number + 1), 0, None) for i in range(number)]
        others = np.column_stack((np.ones_like(time), time, *bends, entropy[:-1], size))
        for name, values in forecasts.items():
            x, y = (series - others @ np.linalg.lstsq(others, series, rcond=None)[0] for series in (values, change))
            found[f"E5/{name}"].append(float(np.arctanh(x @ y / np.sqrt((x @ x) * (y @ y)))))
    return {part: float(np.tanh(np.mean(values))) for part, values in found.items()}


def forecasts_of(run: UpdateRun) -> dict[str, np.ndarray]:
    """Return the change between two evaluations that each formula predicts.

    The size of the updates is also returned.
    """
    size = run.world.steps
    advantage = run.advantage.repeat(run.token.shape[-1], -1).reshape(size, -1)
    logprob, entropy = run.logprob.reshape(size, -1), run.entropy.reshape(size, -1)
    p, surprise = np.exp(logprob), entropy + logprob
    kept = advantage != 0
    tokens = np.maximum(kept.sum(1), 1)
    mean_logprob, mean_advantage = ((values * kept).sum(1) / tokens for values in (logprob, advantage))
    predictions = {
        "covariance": -(logprob - mean_logprob[:, None]) * (advantage - mean_advantage[:, None]),
        "discriminator": -advantage * p * surprise,
        "omega": -advantage * (1 - p) ** 2 * surprise,
        "quadrants": -np.sign(advantage) * np.where(p > 0.5, 1, -1),
        "size": np.abs(advantage),
    }
    by_step = {name: run.rate * (values * kept).sum(1) / tokens for name, values in predictions.items()}
    return {name: values.reshape(-1, run.world.eval_every).sum(1) for name, values in by_step.items()}


def _number(*keys: np.ndarray) -> np.ndarray:
    """Return the cell number of each token; tokens of a cell have equal keys."""
    return np.unique(np.column_stack(keys), axis=0, return_inverse=True)[1].ravel()


def _from_mean(values: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Return values minus the mean of their cell."""
    return values - (np.bincount(cell, values) / np.bincount(cell))[cell]


def _against_random(p: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return shares of the top fifth and of nearly still tokens, relative to random.

    The shares under random logit changes are subtracted.
    """
    drawn = _random_movement(p, size, rng)
    return top_share(size) - top_share(drawn), float((size <= STILL).mean() - (drawn <= STILL).mean())


def _random_movement(p: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return |dp|, to first order, under normal logit changes.

    The total movement is equal to that of ``size``.
    """
    mobility = p * (1 - p)
    spread = size.sum() / mobility.sum() * np.sqrt(np.pi / 2)
    return spread * mobility * np.abs(rng.normal(size=len(p)))


def top_share(size: np.ndarray) -> float:
    """Return the share of movement in the fifth of tokens that moves most."""
    ordered = np.sort(size)[::-1]
    return float(ordered[: round(0.2 * len(ordered))].sum() / ordered.sum())


def _at_equal(values: np.ndarray, bins: np.ndarray, end: np.ndarray, middle: np.ndarray) -> float:
    """Return end over middle, minus 1, each relative to tokens of equal entropy.

    The reference is the average of such tokens.
    """
    either = end | middle
    usual = np.bincount(bins[either], weights=values[either]) / np.bincount(bins[either])
    return float(values[end].sum() / usual[bins[end]].sum() / (values[middle].sum() / usual[bins[middle]].sum()) - 1)
