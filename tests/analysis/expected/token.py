from tests.analysis.expected import SE


def mean(value: float, se: float) -> tuple[float, float, float]:
    return value, value - SE * se, value + SE * se


EXPECTED = {
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
    # Beginning: ratio 1.5, residuals +-0.5, se = sqrt(2 * 0.5) / 2 = 1/2; end: ratio 0.75, residuals +-0.25, se = 1/4.
    # Positive: a has 1, 0.5, 1, b 0.5 throughout: ratio 1.5 at both ends, residuals +-0.25, se = sqrt(2 * 0.125) / 1.
    "u_shape": (
        {},
        [
            *["stage", "sample_sign", "part", "excess", "low", "high"],
            *["has_u_shape", "num_responses", "num_prompts"],
        ],
        [
            ("plateau", "negative", "beginning", 0.5, 0.5 - SE / 2, 0.5 + SE / 2, False, 2, 2),
            ("plateau", "negative", "end", -0.25, -0.25 - SE / 4, -0.25 + SE / 4, False, 2, 2),
            ("plateau", "positive", "beginning", 0.5, 0.5 - SE / 2, 0.5 + SE / 2, False, 2, 2),
            ("plateau", "positive", "end", 0.5, 0.5 - SE / 2, 0.5 + SE / 2, False, 2, 2),
        ],
    ),
    # Right responses: 0.5 in a and in b at the beginning; 0.25 in a and 1 in b at the end, se = half their distance.
    "impact_by_position": (
        {"bins": 5},
        [
            *["is_correct", "position_bin", "position_mid", "impact", "low", "high"],
            *["movement", "movement_low", "movement_high", "accuracy_original", "num_interventions", "num_prompts"],
        ],
        [
            (False, 0, 0.1, -0.25, None, None, 0.25, None, None, 0.25, 1, 1),
            (False, 2, 0.5, 0, None, None, 0, None, None, 0, 1, 1),
            (True, 0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.875, 2, 2),
            (True, 4, 0.9, 0.625, 0.625 - SE * 0.375, 0.625 + SE * 0.375, 0.625, 0, 1, 1, 2, 2),
        ],
    ),
    # Two prompts of one token each: se = half the distance of their values. High-entropy: 1 nat or more, in the last
    # fifth of negative samples only b's token, which did not move; among positive ones only a's first and last.
    "potential_by_position": (
        {"stage": "plateau", "bins": 5},
        [
            *["sample_sign", "position_bin", "position_mid", "movement", "low", "high", "dp"],
            *["grad_norm", "grad_low", "grad_high", "entropy"],
            *["movement_high_entropy", "movement_high_entropy_low", "movement_high_entropy_high"],
            *["num_tokens", "num_high_entropy", "num_prompts"],
        ],
        [
            ("negative", 0, 0.1, *mean(0.15, 0.05), -0.15, *mean(2.5, 1.5), 1.5, *mean(0.15, 0.05), 2, 2, 2),
            *[("negative", i, i / 5 + 0.1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2) for i in (1, 2, 3)],
            ("negative", 4, 0.9, 0.05, 0, 0.05 + SE / 20, -0.05, 1, 1, 1, 0.75, 0, None, None, 2, 1, 2),
            ("positive", 0, 0.1, *mean(0.15, 0.05), 0.15, *mean(1.5, 0.5), 0.75, 0.2, None, None, 2, 1, 2),
            *[("positive", i, i / 5 + 0.1, 0, 0, 0, 0, 1, 1, 1, 0.5, None, None, None, 2, 0, 2) for i in (1, 2, 3)],
            ("positive", 4, 0.9, 0.05, 0, 0.05 + SE / 20, 0.05, *mean(1.5, 0.5), 0.75, 0.1, None, None, 2, 1, 2),
        ],
    ),
    # Prompt a (responses 7 and 8) has two high-entropy tokens at the beginning and one elsewhere, b (9 and 10) one
    # everywhere. Beginning: residuals +-0.5 over 4 tokens, se = sqrt(2 * 0.5) / 4 = 1/4.
    "high_entropy_by_position": (
        {"stage": "plateau", "bins": 5},
        [
            *["stage", "position_bin", "position_mid", "share", "low", "high"],
            *["share_of_high", "num_tokens", "num_prompts", "entropy_threshold"],
        ],
        [
            ("plateau", 0, 0.1, 0.75, 0.75 - SE / 4, 1, 3 / 11, 4, 2, 1),
            *[("plateau", i, i / 5 + 0.1, 0.5, 0.5, 0.5, 2 / 11, 4, 2, 1) for i in (1, 2, 3, 4)],
        ],
    ),
    # Top half: 2 nats or more. Step 1 has two digits and three dogs of them, step 10 one digit: residuals +-0.5 over 6
    # tokens, se = sqrt(2 * 0.5) / 6. " so" is never among them.
    "high_entropy_words": (
        {"stage": "rising", "top": 0.5},
        [
            *["rank", "text", "category", "share", "low", "high"],
            *["high_rate", "entropy_mean", "num_high", "num_all", "num_steps"],
        ],
        [
            (1, "1", "formal_reasoning", 0.5, 0.5 - SE / 6, 0.5 + SE / 6, 3 / 7, 11 / 7, 3, 7, 2),
            (2, "dog", "semantic_support", 0.5, 0.5 - SE / 6, 0.5 + SE / 6, 3 / 4, 2.5, 3, 4, 2),
        ],
    ),
}
