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
}
