"""What each effect comes to in a simulated world: closed forms, and plain numpy on many runs at once.

The second is a reference of its own: it shares neither SQL nor statistics with the toolkit.
"""

from __future__ import annotations

import numpy as np

from analysis.effects.training import mainly_negative
from tests.calibration.simulate import CAPTURE_EVERY, Step, simulate_run
from tests.calibration.worlds import BOUNDARY, GROUP, GROUPS, LENGTHS, STEPS, MethodWorld, World, path

Truth = dict[tuple[str, str], float]


def truth_of_flat_run() -> Truth:
    """A run in which nothing moves."""
    return {("S1", "entropy"): 0.0, ("S1", "accuracy"): 0.0, ("E1", "slope"): 0.0}


def truth_of_methods(world: MethodWorld) -> Truth:
    """An ablation."""
    return {
        **dict.fromkeys((("M1", "avg@k"), ("M2", "avg@k"), ("I3", "avg@k")), world.accuracy),
        ("M3", "length"): world.length,
        ("M3", "formal tokens"): world.formal,
    }


def truth_of_run(world: World, num_runs: int, rng: np.random.Generator) -> Truth:
    """A run with two stages; what has no closed form is measured on ``num_runs`` simulated runs."""
    runs = [simulate_run(world, rng) for _ in range(num_runs)]
    plateau = [step for run in runs for step in run[BOUNDARY:]]
    fifths = np.array([_fifth_means(step) for step in plateau]).mean(0)
    return {
        **_rising_truth(world),
        ("E1", "slope"): _exchange_slope(runs),
        ("I1", "accuracy"): _half_difference(plateau),
        ("I1", "reasoning tokens"): world.reasoning_by_ppl,
        ("T1", "beginning"): fifths[0] / fifths[1] - 1,
        ("T1", "end"): fifths[2] / fifths[1] - 1,
        **_movement_truth([step for step in plateau if step.step % CAPTURE_EVERY == 0]),
        ("I2", "impact"): world.impact_by_ppl,
        ("T2", "impact"): world.impact_slope * _half_distance(),
    }


def _rising_truth(world: World) -> Truth:
    accuracy, negative, positive = (
        np.array(pair) for pair in (world.accuracy, world.negative_entropy, world.positive_entropy)
    )
    gap = negative - positive
    return {
        ("S1", "entropy"): _slowdown(world),
        ("S1", "accuracy"): 1 - world.plateau_speed,
        ("S2", "mainly negative"): float(mainly_negative(np.column_stack((negative, positive, 1 - accuracy)))),
        ("S2", "same prompt"): float(gap[0] - gap[1]),
        ("S3", "reasoning"): world.reasoning[1] - world.reasoning[0],
        ("S3", "other words"): 0.95 * (world.reasoning[1] - world.reasoning[0]),
        ("S4", "any defect"): world.defects[0] - world.defects[1],
    }


def _slowdown(world: World) -> float:
    """That of entropy, a mixture whose shares and means both change, so that its path is not quite straight."""
    right = path(world.accuracy, world)
    entropy = right * path(world.positive_entropy, world) + (1 - right) * path(world.negative_entropy, world)
    step = np.arange(1, STEPS + 1)
    basis = np.column_stack((np.ones(STEPS), step, np.maximum(step - BOUNDARY, 0)))
    _, rising, change = np.linalg.lstsq(basis, entropy, rcond=None)[0]
    return float(1 - abs((rising + change) / rising))


def _exchange_slope(runs: list[list[Step]]) -> float:
    """Covariance over variance within runs: the drift of the policy counts, as it does in a recorded run."""
    x = np.array([[-np.exp(step.entropy[step.mask].mean()) for step in run] for run in runs])
    y = np.array([[step.is_correct.mean() for step in run] for run in runs])
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return float((x * y).sum() / (x * x).sum())


def _half_difference(steps: list[Step]) -> float:
    groups = np.concatenate([step.is_correct.reshape(GROUPS, GROUP) for step in steps])
    order = np.concatenate([step.surprisal.reshape(GROUPS, GROUP).argsort(1) for step in steps])
    ordered = np.take_along_axis(groups, order, 1)
    return float(ordered[:, : GROUP // 2].mean() - ordered[:, GROUP // 2 :].mean())


def _fifth_means(step: Step) -> list[float]:
    """Mean over responses of the mean entropy of first fifth, middle and last fifth."""
    fifth = np.where(step.mask, np.arange(step.mask.shape[1]) * 5 // step.length[:, None], -1)
    parts = (fifth == 0, (fifth > 0) & (fifth < 4), fifth == 4)
    return [float(((step.entropy * part).sum(1) / part.sum(1)).mean()) for part in parts]


def _half_distance() -> float:
    """Mean relative position in the second half minus that in the first, places drawn evenly from responses."""
    places = [(np.arange(length) / length, np.full(length, 1 / length)) for length in LENGTHS]
    place, weight = (np.concatenate(parts) for parts in zip(*places, strict=True))
    late = place >= 0.5
    return float(np.average(place[late], weights=weight[late]) - np.average(place[~late], weights=weight[~late]))


def _movement_truth(steps: list[Step]) -> Truth:
    def tokens(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([value[step.mask] for value, step in zip(values, steps, strict=True)])

    dp = tokens([step.movement for step in steps])
    sign = tokens([np.broadcast_to(np.sign(step.advantage)[:, None], step.mask.shape) for step in steps])
    place = tokens([np.arange(step.mask.shape[1]) / step.length[:, None] for step in steps])
    entropy, grad = tokens([step.entropy for step in steps]), tokens([step.grad_norm for step in steps])
    size = np.abs(dp)
    is_high, is_steep = entropy >= np.quantile(entropy, 0.8), grad >= np.quantile(grad, 0.8)
    end, middle = is_high & (place >= 0.8), is_high & (place >= 0.2) & (place < 0.8)
    turn = dp[is_high & (sign > 0)].mean() - dp[is_high & (sign < 0)].mean()
    return {
        ("S5", "concentration"): size[size >= np.quantile(size, 0.8)].sum() / size.sum() - 0.4399,
        ("S5", "hardly move"): float((size <= 0.01).mean() - 0.5),
        ("S6", "high entropy"): size[is_high].mean() / size[~is_high].mean() - 1,
        ("S6", "large gradient"): size[is_steep].mean() / size[~is_steep].mean() - 1,
        ("S6", "direction"): turn / size[is_high].mean(),
        ("T3", "movement"): size[end].mean() / size[middle].mean() - 1,
        ("T3", "gradient"): grad[end].mean() / grad[middle].mean() - 1,
    }
