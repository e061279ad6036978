from math import log

from tests.analysis.expected import Interval, alone, over_prompts, positive, share


def excess(*prompts: tuple[float, float]) -> Interval:
    """Return a ratio of two entropies minus 1, with its interval."""
    ratio, low, high = positive(*prompts)
    assert low is not None
    assert high is not None
    return ratio - 1, low - 1, high - 1


# Movement of the first token: 0.2 in prompt a, 0.1 in b.
MOVED = positive((0.2, 1), (0.1, 1))
# Of the tokens of step 20, the engine's probability differs at the first one of response 7 (0.4, prompt a) and the last
# one of response 9 (0.2, prompt b), where the trainer's is 0.5.
FIRST, LAST = 0.25 - log(1.25), 1.5 - log(2.5)
EXPECTED = {
    # Entropies of response 7: 1, 0.5, 0.5, 0.5, 1; of 8: 2, 1, 1, 1, 0.5; of 9: 1 throughout.
    "engine_mismatch": (
        {"bins": 5},
        ["breakdown", "bin", "bin_mid", "kl", "low", "high", "ratio_mean", "ratio_share", "num_tokens", "num_prompts"],
        [
            ("entropy", 0, 0.1, *alone(0), 1, 0, 4, 1),
            ("entropy", 1, 0.3, *positive((FIRST, 5), (LAST, 5)), (10 + 0.25 + 1.5) / 10, 0.1, 10, 2),
            ("entropy", 4, 0.9, *alone(0), 1, 0, 1, 1),
            ("position", 0, 0.1, *positive((FIRST, 2), (0, 1)), (3 + 0.25) / 3, 0, 3, 2),
            *[("position", i, (i + 0.5) / 5, 0, 0, 0, 1, 0, 3, 2) for i in (1, 2, 3)],
            ("position", 4, 0.9, *positive((0, 2), (LAST, 1)), (3 + 1.5) / 3, 1 / 3, 3, 2),
            ("step", 0, 0.1, *positive((FIRST, 10), (LAST, 5)), (15 + 0.25 + 1.5) / 15, 1 / 15, 15, 2),
        ],
    ),
    "entropy_by_position": (
        {"stage": "plateau", "bins": 5},
        ["sample_sign", "position_bin", "position_mid", "entropy", "num_tokens", "num_prompts"],
        [
            ("negative", 0, 0.1, 1.5, 2, 2),
            ("negative", 1, 0.3, 1, 2, 2),
            ("negative", 2, 0.5, 1, 2, 2),
            ("negative", 3, 0.7, 1, 2, 2),
            ("negative", 4, 0.9, 0.75, 2, 2),
            ("positive", 0, 0.1, 0.75, 2, 2),
            ("positive", 1, 0.3, 0.5, 2, 2),
            ("positive", 2, 0.5, 0.5, 2, 2),
            ("positive", 3, 0.7, 0.5, 2, 2),
            ("positive", 4, 0.9, 0.75, 2, 2),
        ],
    ),
    # Responses of the rising stage are too short. Negative: a has 2, 1, 0.5 nats (beginning, middle, end), b 1, 1, 1.
    # Positive: a has 1, 0.5, 1, b 0.5 throughout.
    "u_shape": (
        {},
        [
            *["stage", "sample_sign", "part", "excess", "low", "high"],
            *["has_u_shape", "num_responses", "num_prompts"],
        ],
        [
            ("plateau", "negative", "beginning", *excess((2, 1), (1, 1)), False, 2, 2),
            ("plateau", "negative", "end", *excess((0.5, 1), (1, 1)), False, 2, 2),
            ("plateau", "positive", "beginning", *excess((1, 0.5), (0.5, 0.5)), False, 2, 2),
            ("plateau", "positive", "end", *excess((1, 0.5), (0.5, 0.5)), False, 2, 2),
        ],
    ),
    # Right responses: 0.5 in a and in b at the beginning; 0.25 in a and 1 in b at the end.
    "impact_by_position": (
        {"bins": 5},
        [
            *["is_correct", "position_bin", "position_mid", "impact", "low", "high"],
            *[
                "abs_impact",
                "abs_impact_low",
                "abs_impact_high",
                "accuracy_original",
                "num_interventions",
                "num_prompts",
            ],
        ],
        [
            (False, 0, 0.1, -0.25, -1, 1, 0.25, 0, 1, 0.25, 1, 1),
            (False, 2, 0.5, 0, -1, 1, 0, 0, 1, 0, 1, 1),
            *[
                (True, position_bin, mid, *over_prompts(*both, low=-1, high=1), *share(*both), original, 2, 2)
                for position_bin, mid, both, original in (
                    (0, 0.1, [(0.5, 1), (0.5, 1)], 0.875),
                    (4, 0.9, [(0.25, 1), (1, 1)], 1),
                )
            ],
        ],
    ),
    # Two prompts of one token each. High-entropy: 1 nat or more, in the last fifth of negative samples only b's token,
    # which did not move; among positive ones only a's first and last.
    "potential_by_position": (
        {"stage": "plateau", "bins": 5},
        [
            *["sample_sign", "position_bin", "position_mid", "movement", "low", "high", "dp"],
            *["grad_norm", "grad_low", "grad_high", "entropy"],
            *["movement_high_entropy", "movement_high_entropy_low", "movement_high_entropy_high"],
            *["num_tokens", "num_high_entropy", "num_prompts"],
        ],
        [
            ("negative", 0, 0.1, *MOVED, -0.15, *positive((4, 1), (1, 1)), 1.5, *MOVED, 2, 2, 2),
            *[("negative", i, i / 5 + 0.1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2) for i in (1, 2, 3)],
            ("negative", 4, 0.9, *positive((0.1, 1), (0, 1)), -0.05, 1, 1, 1, 0.75, *alone(0), 2, 1, 2),
            ("positive", 0, 0.1, *MOVED, 0.15, *positive((2, 1), (1, 1)), 0.75, *alone(0.2), 2, 1, 2),
            *[("positive", i, i / 5 + 0.1, 0, 0, 0, 0, 1, 1, 1, 0.5, None, None, None, 2, 0, 2) for i in (1, 2, 3)],
            (
                *("positive", 4, 0.9, *positive((0.1, 1), (0, 1)), 0.05, *positive((2, 1), (1, 1)), 0.75),
                *(*alone(0.1), 2, 1, 2),
            ),
        ],
    ),
    # Prompt a (responses 7 and 8) has two high-entropy tokens at the beginning and one elsewhere, b (9 and 10) one
    # everywhere.
    "high_entropy_by_position": (
        {"stage": "plateau", "bins": 5},
        [
            *["stage", "position_bin", "position_mid", "share", "low", "high"],
            *["share_of_high", "num_tokens", "num_prompts", "entropy_threshold"],
        ],
        [
            ("plateau", 0, 0.1, *share((2, 2), (1, 2)), 3 / 11, 4, 2, 1),
            *[("plateau", i, i / 5 + 0.1, *share((1, 2), (1, 2)), 2 / 11, 4, 2, 1) for i in (1, 2, 3, 4)],
        ],
    ),
    # Of the 20 tokens, 11 have at least 1 nat: 6 of a and 5 of b. Under the reference policy 5 have: a's first and last
    # (response 7), second and third (8), and b's first (10). By position, of four tokens each, 3, 2, 2, 2, 2 have at
    # least 1 nat under the policy, and 2, 1, 1, 0, 1 under the reference policy.
    "entropy_persistence": (
        {"stage": "plateau", "bins": 5},
        [
            *["step", "share", "low", "high", "by_position", "independent"],
            *["num_high", "num_tokens", "num_prompts"],
        ],
        [(20, *share((4, 6), (0, 5)), (3 * 2 + 2 + 2 + 0 + 2) / 4 / 11, 5 / 20, 11, 20, 2)],
    ),
    # Top half: 2 nats or more. Step 1 has two digits and three dogs of them, step 10 one digit. " so" is never among
    # them.
    "high_entropy_words": (
        {"stage": "rising", "top": 0.5},
        [
            *["rank", "text", "category", "share"],
            *["high_rate", "entropy_mean", "num_high", "num_all", "num_steps"],
        ],
        [
            (1, "1", "formal_reasoning", 0.5, 3 / 7, 11 / 7, 3, 7, 2),
            (2, "dog", "semantic_support", 0.5, 3 / 4, 2.5, 3, 4, 2),
        ],
    ),
}
