from tests.analysis.expected import share

EXPECTED = {
    # Prompt a is right at low ppl, prompt b at high ppl in both stages; a is there once more at step 10.
    "correctness_by_ppl": (
        {"bins": 2},
        ["stage", "ppl_bin", "accuracy", "num_responses", "num_prompts"],
        [
            ("rising", 1, 2 / 3, 3, 2),
            ("rising", 2, 1 / 3, 3, 2),
            ("plateau", 1, 0.5, 2, 2),
            ("plateau", 2, 0.5, 2, 2),
        ],
    ),
    # By ppl: 11, 12 (c, right, 1.0), 7 (a, right, 1.1) | 9 (b, wrong, 1.1), 10 (b, right, 1.2), 8 (a, wrong, 1.3);
    # dropped groups count. Upper half: b has 1 of 2, a 0 of 1.
    "accuracy_by_ppl_decile": (
        {"bins": 2, "stage": "plateau"},
        [
            *["stage", "ppl_bin", "accuracy", "low", "high"],
            *["ppl_mean", "ppl_low", "ppl_high", "num_responses", "num_prompts"],
        ],
        [
            ("plateau", 1, *share((2, 2), (1, 1)), 3.1 / 3, 1.0, 1.1, 3, 2),
            ("plateau", 2, *share((1, 2), (0, 1)), 3.6 / 3, 1.1, 1.3, 3, 2),
        ],
    ),
    # High-entropy: 1 nat or more; groups of two fill terciles 1 and 2. Tercile 1: response 7 (a) has a digit and a dog,
    # 9 (b) a digit and four. Tercile 2: 8 (a) has a digit and three dogs, 10 none, so that one prompt is left.
    "high_entropy_by_ppl": (
        {"stage": "plateau"},
        ["stage", "ppl_tercile", "category", "share", "low", "high", "num_tokens", "num_prompts"],
        [
            ("plateau", 1, "formal_reasoning", *share((1, 2), (1, 5)), 7, 2),
            ("plateau", 1, "logical_structuring", *share((0, 2), (0, 5)), 7, 2),
            ("plateau", 1, "metacognitive", *share((0, 2), (0, 5)), 7, 2),
            ("plateau", 1, "reasoning", *share((1, 2), (1, 5)), 7, 2),
            ("plateau", 1, "semantic_support", *share((1, 2), (4, 5)), 7, 2),
            ("plateau", 1, "special", *share((0, 2), (0, 5)), 7, 2),
            ("plateau", 2, "formal_reasoning", *share((1, 4)), 4, 1),
            ("plateau", 2, "logical_structuring", *share((0, 4)), 4, 1),
            ("plateau", 2, "metacognitive", *share((0, 4)), 4, 1),
            ("plateau", 2, "reasoning", *share((1, 4)), 4, 1),
            ("plateau", 2, "semantic_support", *share((3, 4)), 4, 1),
            ("plateau", 2, "special", *share((0, 4)), 4, 1),
        ],
    ),
    # Every cell holds one prompt, so that intervals cover all there can be.
    "robustness_by_ppl": (
        {},
        [
            *["is_correct", "ppl_tercile", "impact", "low", "high", "abs_impact", "abs_impact_low", "abs_impact_high"],
            *["accuracy_original", "accuracy_alternative", "num_interventions", "num_prompts"],
        ],
        [
            (False, 1, 0, -1, 1, 0, 0, 1, 0, 0, 1, 1),
            (False, 3, -0.25, -1, 1, 0.25, 0, 1, 0.25, 0.5, 1, 1),
            (True, 1, 0.375, -1, 1, 0.375, 0, 1, 1, 0.625, 2, 1),
            (True, 3, 0.75, -1, 1, 0.75, 0, 1, 0.875, 0.125, 2, 1),
        ],
    ),
}
