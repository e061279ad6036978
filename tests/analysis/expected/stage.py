from math import exp
from statistics import linear_regression

import pytest

from tests.analysis.expected import Interval, alone, over_prompts, positive, share

# Entropy falls by 0.15 nats and accuracy rises by 0.05 at each of the first 10 steps.
CURVE = [(2 - 0.15 * min(step, 10), 0.25 + 0.05 * min(step, 10)) for step in range(1, 25)]
SLOPE, INTERCEPT = linear_regression([exp(entropy) for entropy, _ in CURVE], [accuracy for _, accuracy in CURVE])


def carried(by_a: float, by_b: float) -> Interval:
    """Return the share of all movement that lies in the contributions of a and b.

    All movement is 0.6 for prompt a and 0.2 for prompt b.
    """
    return share((by_a, 0.6), (by_b, 0.2))


EXPECTED = {
    "stage_dynamics": (
        {"stage": "plateau"},
        ["step", "stage", "entropy_token_mean", "entropy_fit", "accuracy", "accuracy_fit", "boundary_step"],
        [(step, "plateau", 0.5, 0.5, 0.75, 0.75, 10) for step in range(11, 25)],
    ),
    # Step 1, negative: sums 8 and 4 over 2 and 2 tokens.
    "entropy_by_sample_sign": (
        {"stage": "rising"},
        ["step", "sample_sign", "phase", "entropy", "low", "high", "num_tokens", "num_prompts", "token_share"],
        [
            (1, "negative", "start", *positive((8, 2), (4, 2)), 4, 2, 0.5),
            (1, "positive", "start", *positive((4, 2), (2, 2)), 4, 2, 0.5),
            (10, "negative", "end", *alone(1), 2, 1, 0.5),
            (10, "positive", "end", *alone(1), 2, 1, 0.5),
        ],
    ),
    "defects_over_steps": (
        {"stage": "rising"},
        ["step", "defect", "share", "low", "high", "num_responses"],
        [
            (1, "any", *share((1, 2), (1, 2)), 4),
            (1, "format_violation", *share((1, 2), (1, 2)), 4),
            (1, "irrelevant", *share((0, 2), (0, 2)), 4),
            (1, "repetition", *share((0, 2), (0, 2)), 4),
            (1, "truncated", *share((0, 2), (1, 2)), 4),
            *[(10, name, *share((0, 2)), 2) for name in ("any", "format_violation", "irrelevant")],
            *[(10, name, *share((0, 2)), 2) for name in ("repetition", "truncated")],
        ],
    ),
    "exchange_law": (
        {},
        ["step", "stage", "entropy", "accuracy", "accuracy_fit", "a", "b", "ceiling", "num_steps"],
        [
            (
                step,
                "rising" if step <= 10 else "plateau",
                entropy,
                accuracy,
                INTERCEPT + SLOPE * exp(entropy),
                -SLOPE,
                INTERCEPT,
                INTERCEPT + SLOPE,
                24,
            )
            for step, (entropy, accuracy) in enumerate(CURVE, start=1)
        ],
    ),
    # Prompt a: 4 - 2 at step 1, 1 - 1 at step 10, 1.1 - 0.7 at step 20; prompt b: 2 - 1 and 1 - 0.5.
    "entropy_gap_by_prompt": (
        {},
        ["step", "stage", "gap", "low", "high", "num_prompts", "boundary_step"],
        [
            (1, "rising", *over_prompts((2, 1), (1, 1)), 2, 10),
            (10, "rising", *alone(0), 1, 10),
            (20, "plateau", *over_prompts((0.4, 1), (0.5, 1)), 2, 10),
        ],
    ),
    # A digit and a word in each response of step 1; at step 10 three digits and " so", all of one prompt.
    "category_shares": (
        {"stage": "rising"},
        ["step", "category", "share", "low", "high", "num_tokens", "num_prompts"],
        [
            (1, "formal_reasoning", *share((2, 4), (2, 4)), 4, 2),
            (1, "logical_structuring", *share((0, 4), (0, 4)), 0, 2),
            (1, "metacognitive", *share((0, 4), (0, 4)), 0, 2),
            (1, "semantic_support", *share((2, 4), (2, 4)), 4, 2),
            (1, "special", *share((0, 4), (0, 4)), 0, 2),
            (10, "formal_reasoning", *share((3, 4)), 3, 1),
            (10, "logical_structuring", *share((1, 4)), 1, 1),
            (10, "metacognitive", *share((0, 4)), 0, 1),
            (10, "semantic_support", *share((0, 4)), 0, 1),
            (10, "special", *share((0, 4)), 0, 1),
        ],
    ),
    # "so" rises as much as "1", which comes first in the alphabet. One step per phase leaves no interval.
    "word_changes": (
        {"min_count": 1, "words": 1},
        ["word", "category", "share_start", "share_end", "change", "low", "high", "num_start", "num_end", "rank_rise"],
        [
            ("1", "formal_reasoning", 0.5, 0.75, 0.25, None, None, 4, 3, 1),
            ("dog", "semantic_support", 0.5, 0, -0.5, None, None, 4, 0, 3),
        ],
    ),
    # Of five tokens per sign, prompt a has 0.2, 0.1 and three 0, prompt b 0.1 and four 0. 0.1 is the edge of a bin: in
    # float32 0.5 + 0.1 lies a little lower, 0.5 - 0.1 as well.
    "movement_distribution": (
        {"stage": "plateau"},
        ["sample_sign", "bin_low", "bin_high", "share", "low", "high", "num_tokens", "num_prompts"],
        [
            (sign, 10 ** (bin / 4) if bin > -25 else 0, 10 ** ((bin + 1) / 4), *share((a, 5), (b, 5)), a + b, 2)
            for sign, bin_of_tenth in (("negative", -4), ("positive", -5))
            for bin in range(-25, 0)
            for a, b in [{-25: (3, 4), bin_of_tenth: (1, 1), -3: (1, 0)}.get(bin, (0, 0))]
        ],
    ),
    # 20 tokens of the plateau: 0.2 twice (a), 0.1 twice in a and in b, else 0. Each prompt gives its excess over the
    # threshold (0.2, 0.2, 0.1), and the top share of the threshold for each of its 10 tokens. Every p is 1/2, so that
    # random logit changes move tokens by a normal distribution: exp(-z^2 / 2) with P(|Z| > z) = top.
    "movement_concentration": (
        {"stage": "plateau"},
        ["top", "share", "low", "high", "even", "random", "num_tokens", "num_prompts"],
        [
            (0.01, *carried(0.02, 0.02), 0.01, pytest.approx(0.0362452, abs=1e-5), 20, 2),
            (0.05, *carried(0.1, 0.1), 0.05, pytest.approx(0.1465001, abs=1e-5), 20, 2),
            (0.2, *carried(0.4, 0.2), 0.2, pytest.approx(0.4399091, abs=1e-5), 20, 2),
        ],
    ),
    # Entropy 0.5 nine times, 1 ten times, 2 once: deciles 1, 5 and 10. Both 8-token rows: 3 tokens of one prompt
    # without movement, 5 of the other with 0.1 in all.
    "movement_by_entropy": (
        {"stage": "plateau"},
        [
            *["sample_sign", "entropy_decile", "dp", "low", "high", "movement", "movement_low", "movement_high"],
            *["grad_norm", "entropy_mean", "num_tokens", "num_prompts"],
        ],
        [
            ("negative", 1, *alone(-0.1), *alone(0.1), 1, 0.5, 1, 1),
            ("negative", 5, *over_prompts((0, 3), (-0.1, 5)), *positive((0, 3), (0.1, 5)), 1, 1, 8, 2),
            ("negative", 10, *alone(-0.2), *alone(0.2), 4, 2, 1, 1),
            ("positive", 1, *over_prompts((0, 3), (0.1, 5)), *positive((0, 3), (0.1, 5)), 1, 0.5, 8, 2),
            ("positive", 5, *alone(0.15), *alone(0.15), 2, 1, 2, 1),
        ],
    ),
    # Digits come first, words follow. Words: 0.1 among the four of one prompt.
    "movement_by_category": (
        {"stage": "plateau"},
        [
            *["sample_sign", "category", "dp", "low", "high", "movement", "movement_low", "movement_high"],
            *["grad_norm", "num_tokens", "num_prompts"],
        ],
        [
            *[
                (
                    sign,
                    category,
                    *over_prompts((direction * a, count), (direction * b, count)),
                    *positive((a, count), (b, count)),
                    grad_norm,
                    2 * count,
                    2,
                )
                for sign, direction, category, a, b, count, grad_norm in (
                    ("negative", -1, "formal_reasoning", 0.2, 0.1, 1, 2.5),
                    ("negative", -1, "semantic_support", 0.1, 0.0, 4, 1),
                    ("positive", 1, "formal_reasoning", 0.2, 0.1, 1, 1.5),
                    ("positive", 1, "semantic_support", 0.1, 0.0, 4, 1.125),
                )
            ],
        ],
    ),
    # log2 of entropy and gradient norm, negative: (1, 2), (-1, 0) and eight (0, 0): 2 / sqrt(2 * (4 - 4/10)).
    # Positive: (0, 1) and (-1, 0) only. Entropy 0.5, 1, 2 in cells 29, 32, 34 from 1e-4, norms 1, 2, 4 in 26, 28, 30.
    "entropy_gradient_density": (
        {"stage": "plateau"},
        ["sample_sign", "entropy_low", "grad_norm_low", "num_tokens", "share", "correlation", "low", "num_steps"],
        [
            ("negative", 10**-0.375, 10**-0.1, 1, 0.1, 2 / 7.2**0.5, None, 1),
            ("negative", 1, 10**-0.1, 8, 0.8, 2 / 7.2**0.5, None, 1),
            ("negative", 10**0.25, 10**0.5, 1, 0.1, 2 / 7.2**0.5, None, 1),
            ("positive", 10**-0.375, 10**-0.1, 8, 0.8, 1, None, 1),
            ("positive", 1, 10**0.2, 2, 0.2, 1, None, 1),
        ],
    ),
}
