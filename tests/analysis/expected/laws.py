"""Rows of the trial of entropy laws on conftest's trace, by loops over tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from math import exp, log, sqrt
from statistics import mean
from typing import Any

from tests.analysis.conftest import CLIPPED, ENTROPY_CHANGES, GRAD_NORMS, MOVED, RESPONSES, TOKEN_IDS, VOCABULARY_SUMS
from tests.analysis.expected import alone, over_prompts

Token = dict[str, Any]
CATEGORIES = ("special", "formal_reasoning", "logical_structuring", "semantic_support")
LOGPROB, P = log(0.5), 0.5


def tokens_of_trace() -> list[Token]:
    """Return the tokens with after-update values; those of step 1 have none."""
    found = []
    for rollout_id, step, prompt, is_correct, _, entropies, _, _ in RESPONSES:
        for i, entropy in enumerate(entropies if rollout_id in MOVED else []):
            found.append(
                {
                    "step": step,
                    "prompt": prompt,
                    "a": 1.0 if is_correct else -1.0,
                    "h": entropy,
                    "dh": ENTROPY_CHANGES[rollout_id][i],
                    "dlogp": log(0.5 + MOVED[rollout_id][i]) - LOGPROB,
                    "grad": GRAD_NORMS.get(rollout_id, [1] * len(entropies))[i],
                    "position": i / len(entropies),
                    "sums": [(i + 1) * value for value in VOCABULARY_SUMS.values()],
                    "is_clipped": i in CLIPPED.get(rollout_id, []),
                    "category": CATEGORIES[TOKEN_IDS.get(rollout_id, [1] + [3] * (len(entropies) - 1))[i]],
                }
            )
    return found


TOKENS = tokens_of_trace()


def step_mean(token: Token, value: Callable[[Token], float]) -> float:
    return mean(value(other) for other in TOKENS if other["step"] == token["step"])


# All logprobs are equal, hence so is their mean, and the covariance is 0. p = 1/2 is not above 1/2. All tokens of the
# update have after-update values at these steps. Categories of step 20 have one mean at other steps, or none.
PREDICTIONS: dict[str, Callable[[Token], float]] = {
    "covariance": lambda t: 0.0,
    "discriminator": lambda t: -t["a"] * P * (t["h"] + LOGPROB),
    "centered_discriminator": lambda t: (
        -t["a"] * (P * (t["h"] + LOGPROB) - step_mean(t, lambda o: P * (o["h"] + LOGPROB)))
    ),
    "first_order": lambda t: -t["a"] * (P * (1 - P) * (t["h"] + LOGPROB) - t["sums"][0] * t["h"] - t["sums"][1]),
    "omega": lambda t: -t["a"] * (1 - P) ** 2 * (t["h"] + LOGPROB),
    "omega_unsquared": lambda t: -t["a"] * (1 - P) * (t["h"] + LOGPROB),
    "quadrants": lambda t: t["a"],
    "own_gradient": lambda t: t["grad"] ** 2 / t["a"],
    "entropy_ratio": lambda t: log((t["h"] + t["dh"] + 1e-8) / (t["h"] + 1e-8)),
    "entropy": lambda t: t["h"],
    "position": lambda t: t["position"],
    "relative_surprisal": lambda t: -LOGPROB / (t["h"] + 1e-6),
}
KINDS = {
    "formula": ("centered_discriminator", "discriminator", "first_order", "omega", "omega_unsquared", "quadrants"),
    "gradient": ("own_gradient",),
    "outcome": ("entropy_ratio",),
    "property": ("entropy", "position", "relative_surprisal"),
}


def deviations(tokens: list[Token], values: list[float], cell: Callable[[Token], object]) -> list[float]:
    """Return the deviation of each value from the mean of its cell."""
    cells = defaultdict(list)
    for token, value in zip(tokens, values, strict=True):
        cells[cell(token)].append(value)
    return [value - mean(cells[cell(token)]) for token, value in zip(tokens, values, strict=True)]


# All probabilities are equal, so cells differ by sign, or by entropy; equal entropies and no others share a bin.
CELLS = {
    "overall": lambda t: t["step"],
    "shuffle": lambda t: (t["step"], t["a"]),
    "random": lambda t: (t["step"], t["h"]),
}


def pairs(tokens: list[Token], predictor: str, target: str) -> dict[str, list[tuple[float, float]]]:
    """Return deviations of prediction and change, by kind of cell."""
    x, y = [PREDICTIONS[predictor](token) for token in tokens], [token[target] for token in tokens]
    return {
        name: list(zip(deviations(tokens, x, cell), deviations(tokens, y, cell), strict=True))
        for name, cell in CELLS.items()
    }


def dot(values: Iterable[tuple[float, float]]) -> float:
    return sum(x * y for x, y in values)


def of_prompt(tokens: list[Token], prompt: str, values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [pair for token, pair in zip(tokens, values, strict=True) if token["prompt"] == prompt]


def correlations(kind: str, predictor: str) -> list[tuple]:
    """Return the rows of a predictor in the plateau, by comparison."""
    tokens = [token for token in TOKENS if token["step"] == 20]
    rows = []
    for comparison, products in sorted(pairs(tokens, predictor, "dh").items()):
        if not any(abs(x) > 1e-9 for x, _ in products):
            continue
        n = len(tokens)
        xx, yy = (sum(pair[i] ** 2 for pair in products) / n for i in (0, 1))
        r = dot(products) / n / sqrt(xx * yy)
        totals = []
        for prompt in ("a", "b"):
            own = of_prompt(tokens, prompt, products)
            total = sum(x * y / sqrt(xx * yy) - r * (x * x / xx + y * y / yy) / 2 + r for x, y in own)
            totals.append((total, len(own)))
        rows.append((kind, predictor, comparison, *over_prompts(*totals, low=-1, high=1), n, 2, 1))
    return rows


def sums(predictor: str, target: str) -> list[tuple]:
    """Return the sums of ``law_sums`` by step and prompt."""
    found = pairs(TOKENS, predictor, target)
    rows = []
    for step, prompt in ((10, "a"), (20, "a"), (20, "b")):
        at = [i for i, t in enumerate(TOKENS) if (t["step"], t["prompt"]) == (step, prompt)]
        shift = sum(abs(TOKENS[i]["dlogp"]) for i in at)
        for comparison, deviating in found.items():
            own = [deviating[i] for i in at]
            squares = (sum(x * x for x, _ in own), sum(y * y for _, y in own), dot(own))
            rows.append((step, prompt, predictor, comparison, len(at), *squares, len(at), shift, 0))
    return rows


PLATEAU = [token for token in TOKENS if token["step"] == 20]
SIGNS = {"negative": -1.0, "positive": 1.0}


def interval(tokens: list[Token], value: Callable[[Token], float], of: list[Token] | None = None) -> tuple:
    """Return the mean of a value with its interval over prompts a and b.

    The sum is divided by the number of tokens ``of`` (default: ``tokens``).
    """
    totals = []
    for prompt in ("a", "b"):
        own, all_own = ([t for t in chosen if t["prompt"] == prompt] for chosen in (tokens, of or tokens))
        if all_own:
            totals.append((sum(map(value, own)), len(all_own)))
    return over_prompts(*totals) if len(totals) > 1 else alone(totals[0][0] / totals[0][1])


def losses() -> list[tuple]:
    """Return the rows of ``entropy_losses``.

    Every probability is 1/2, up to the rounding of float32.
    """
    bins = {
        "category": lambda t: t["category"],
        "position": lambda t: f"fifth {1 + int(5 * t['position'] + 1e-9)}",
        "probability": lambda t: "p .1 to .5",
    }
    rows = []
    for sign, a in SIGNS.items():
        of_sign = [t for t in PLATEAU if t["a"] == a]
        for breakdown, bin_of in bins.items():
            for name in sorted({bin_of(t) for t in of_sign}):
                own = [t for t in of_sign if bin_of(t) == name]
                mean_change = interval(own, lambda t: t["dh"], PLATEAU)
                rows.append((sign, breakdown, name, *mean_change, len(own) / len(PLATEAU), len(own), 2))
    return rows


def of_clipped() -> list[tuple]:
    """Return the rows of ``entropy_of_clipped``.

    All tokens of a sign and step have an equal probability.
    """
    rows = []
    for sign, a in SIGNS.items():
        of_sign = [t for t in PLATEAU if t["a"] == a]
        for kind, is_clipped in (("clipped", True), ("comparable", False)):
            own = [t for t in of_sign if t["is_clipped"] == is_clipped]
            shift = mean(t["dlogp"] for t in own)
            prompts = len({t["prompt"] for t in own})
            change = interval(own, lambda t: t["dh"])
            rows.append((sign, kind, *change, shift, len(own) / len(of_sign), len(own), prompts))
    return rows


def calibration() -> list[tuple]:
    """Return the rows of ``entropy_law_calibration``.

    Bins have a width of half a standard deviation of the fitted change.
    """
    rows = []
    for predictor in ("discriminator", "entropy", "omega", "quadrants"):
        found = pairs(PLATEAU, predictor, "dh")["overall"]
        slope = dot(found) / sum(x * x for x, _ in found)
        predicted = [slope * x for x, _ in found]
        sd = sqrt(mean(value * value for value in predicted))
        binned = defaultdict(list)
        for token, value, (_, y) in zip(PLATEAU, predicted, found, strict=True):
            binned[max(-3, min(3, round(2 * value / sd) / 2))].append({**token, "predicted": value, "y": y})
        for name, own in sorted(binned.items()):
            measured = interval(own, lambda t: t["y"])
            prompts = len({t["prompt"] for t in own})
            rows.append((predictor, name, mean(t["predicted"] for t in own), *measured, len(own), prompts))
    return rows


JUDGED = {
    **dict.fromkeys(("covariance", "discriminator", "entropy", "omega", "quadrants"), "dh"),
    "own_gradient": "dlogp",
}


def forecasts() -> list[tuple]:
    """Return the rows of ``entropy_forecasts``.

    There are 24 updates at a learning rate of 0.1, three of which have tokens. Entropy does not change between the two
    evaluations. Step 1 has no sums over the vocabulary.
    """
    first = [
        {"step": 1, "a": 1.0 if is_correct else -1.0, "h": entropy}
        for _, step, _, is_correct, _, entropies, _, _ in RESPONSES
        for entropy in entropies
        if step == 1
    ]
    rows = []
    for predictor in ("covariance", "discriminator", "first_order", "omega", "quadrants"):
        tokens = TOKENS if predictor == "first_order" else [*first, *TOKENS]
        steps = sorted({token["step"] for token in tokens})
        of_steps = [[token for token in tokens if token["step"] == step] for step in steps]
        predicted = mean(mean(PREDICTIONS[predictor](token) for token in own) for own in of_steps)
        # Every advantage is 1 or -1.
        rows.append((predictor, 0, 24, 24 * 0.1 * predicted, 0.0, 0.5, 24 * 0.1, 24, len(steps)))
    return rows


EXPECTED = {
    "entropy_forecasts": (
        {},
        [
            *("predictor", "from_step", "to_step", "predicted", "measured", "entropy_before", "update_size"),
            *("num_updates", "num_recorded"),
        ],
        forecasts(),
    ),
    "entropy_laws": (
        {"stage": "plateau"},
        ["kind", "predictor", "comparison", "correlation", "low", "high", "num_tokens", "num_prompts", "num_steps"],
        [row for kind, names in KINDS.items() for name in names for row in correlations(kind, name)],
    ),
    "entropy_losses": (
        {"stage": "plateau"},
        ["sample_sign", "breakdown", "bin", "contribution", "low", "high", "share", "num_tokens", "num_prompts"],
        losses(),
    ),
    "entropy_of_clipped": (
        {"stage": "plateau"},
        ["sample_sign", "kind", "change", "low", "high", "shift", "share", "num_tokens", "num_prompts"],
        of_clipped(),
    ),
    "entropy_law_calibration": (
        {"stage": "plateau"},
        ["predictor", "bin", "predicted", "measured", "low", "high", "num_tokens", "num_prompts"],
        calibration(),
    ),
    "law_sums": (
        {},
        [
            *("step", "prompt_id", "predictor", "comparison", "tokens", "xx", "yy", "xy"),
            *("uncertain_tokens", "uncertain_shift", "coarse_tokens"),
        ],
        sorted(row for predictor, target in JUDGED.items() for row in sums(predictor, target)),
    ),
}
assert exp(LOGPROB) == P
