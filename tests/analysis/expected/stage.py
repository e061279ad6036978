from tests.analysis.expected import SE

EXPECTED = {
    "stage_dynamics": (
        {"stage": "plateau"},
        ["step", "stage", "entropy_token_mean", "entropy_fit", "accuracy", "accuracy_fit", "boundary_step"],
        [(step, "plateau", 0.5, 0.5, 0.75, 0.75, 10) for step in range(11, 25)],
    ),
    # Step 1, negative: sums 8 and 4 over 2 and 2 tokens: mean 3, residuals +2 and -2, se = sqrt(2 * 8) / 4 = 1.
    "entropy_by_sample_sign": (
        {"stage": "rising"},
        ["step", "sample_sign", "window", "entropy", "low", "high", "num_tokens", "num_prompts", "token_share"],
        [
            (1, "negative", "start", 3, 3 - SE, 3 + SE, 4, 2, 0.5),
            (1, "positive", "start", 1.5, 1.5 - SE / 2, 1.5 + SE / 2, 4, 2, 0.5),
            (10, "negative", "end", 1, None, None, 2, 1, 0.5),
            (10, "positive", "end", 1, None, None, 2, 1, 0.5),
        ],
    ),
    "defects_over_steps": (
        {"stage": "rising"},
        ["step", "defect", "share", "low", "high", "num_responses"],
        [
            (1, "any", 0.5, 0.5, 0.5, 4),
            (1, "format_violation", 0.5, 0.5, 0.5, 4),
            (1, "irrelevant", 0, 0, 0, 4),
            (1, "repetition", 0, 0, 0, 4),
            # One of a prompt's two responses: residuals +-1/2, se = sqrt(2 * 1/2) / 4 = 1/4.
            (1, "truncated", 0.25, 0, 0.25 + SE / 4, 4),
            *[(10, name, 0, None, None, 2) for name in ("any", "format_violation", "irrelevant")],
            *[(10, name, 0, None, None, 2) for name in ("repetition", "truncated")],
        ],
    ),
}
