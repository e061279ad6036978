EXPECTED = {
    "window_sums": (
        {},
        ["prompt_id", "window", "sample_sign", "entropy_sum", "num_tokens", "num_responses", "num_defective"],
        [
            ("a", "end", "negative", 2, 2, 1, 0),
            ("a", "end", "positive", 2, 2, 1, 0),
            ("a", "start", "negative", 8, 2, 1, 1),
            ("a", "start", "positive", 4, 2, 1, 0),
            ("b", "start", "negative", 4, 2, 1, 1),
            ("b", "start", "positive", 2, 2, 1, 0),
        ],
    ),
    "ppl_halves": ({}, ["prompt_id", "difference_sum", "num_groups"], [("a", 1, 1), ("b", -1, 1)]),
    "position_fifths": (
        {},
        ["prompt_id", "first_sum", "middle_sum", "last_sum", "num_responses"],
        [("a", 3, 1.5, 1.5, 2), ("b", 1.5, 1.5, 1.5, 2)],
    ),
    "eval_sums": (
        {"k": 1},
        ["step", "prompt_id", "avg_at_k", "response_length"],
        [(0, "held/h1", 1, 4), (0, "held/h2", 0, 4), (24, "held/h1", 1, 4), (24, "held/h2", 0, 4)],
    ),
    # The first token of each response is a digit; the last 10 of 24 steps hold step 20 only.
    "formal_sums": (
        {},
        ["prompt_id", "num_tokens", "num_formal"],
        [("a", 10, 2), ("b", 10, 2), ("c", 10, 2)],
    ),
}
