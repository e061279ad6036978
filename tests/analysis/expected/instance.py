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
}
