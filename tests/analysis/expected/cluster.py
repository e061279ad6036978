from tests.analysis.expected import Q_01

EXPECTED = {
    # Step 1: wrong responses have 8 + 4 nats over 4 tokens; within prompt a the gap is 4 - 2, within b 2 - 1.
    "response_series": (
        {},
        ["step", "negative_entropy", "positive_entropy", "negative_share", "defect_share", "gap"],
        [(1, 3, 1.5, 0.5, 0.5, 1.5), (10, 1, 1, 0.5, 0, 0), (20, 1.05, 0.6, 0.5, 0, 0.45)],
    ),
    "category_series": (
        {},
        ["step", "reasoning_share", "semantic_share"],
        [(1, 0.5, 0.5), (10, 1, 0), (20, 0.2, 0.8)],
    ),
    "ppl_halves": ({}, ["step", "prompt_id", "difference", "num_groups"], [(20, "a", 1, 1), (20, "b", -1, 1)]),
    # Top 20 % of 20 tokens: one of 2 nats, and all of 1 nat, since they tie. A group of two has no third tercile.
    "high_entropy_terciles": (
        {},
        ["step", "prompt_id", "low_tokens", "low_reasoning", "high_tokens", "high_reasoning"],
        [(20, "a", 2, 1, 0, 0), (20, "b", 5, 1, 0, 0)],
    ),
    # The top fifth is 4 of 20 tokens: two of .2 in a, and two of the four of .1, two of which lie in a and two in b. A
    # prompt gives its excess over the threshold q, and q for a fifth of its tokens. All gradient norms of 1 tie at the
    # threshold of the top 20 %, so that every token is above it.
    "movement_sums": (
        {},
        [
            *("prompt_id", "tokens", "movement", "still_tokens", "top_movement"),
            *("high_entropy_tokens", "high_entropy_movement", "high_gradient_tokens", "high_gradient_movement"),
            *("positive_tokens", "positive_dp", "negative_tokens", "negative_dp"),
            *("end_tokens", "end_movement", "end_grad_norm", "middle_tokens", "middle_movement", "middle_grad_norm"),
        ],
        [
            ("a", 10, 0.6, 6, 0.6 - 2 * Q_01, 6, 0.5, 10, 0.6, 2, 0.3, 4, -0.2, 1, 0.1, 2, 3, 0, 3),
            ("b", 10, 0.2, 8, 0.2, 5, 0.1, 10, 0.2, 0, 0, 5, -0.1, 1, 0, 1, 3, 0, 3),
        ],
    ),
    "impact_sums": (
        {},
        [
            *("prompt_id", "low_ppl_tokens", "low_ppl_impact", "high_ppl_tokens", "high_ppl_impact"),
            *("early_tokens", "early_impact", "late_tokens", "late_impact"),
        ],
        [("a", 2, 0.75, 0, 0, 1, 0.5, 1, 0.25), ("b", 0, 0, 2, 1.5, 1, 0.5, 1, 1)],
    ),
    "position_fifths": (
        {},
        ["step", "prompt_id", "first_sum", "middle_sum", "last_sum", "num_responses"],
        [(20, "a", 3, 1.5, 1.5, 2), (20, "b", 1.5, 1.5, 1.5, 2)],
    ),
    "eval_sums": (
        {"k": 1},
        ["step", "prompt_id", "avg_at_k", "response_length"],
        [(0, "held/h1", 1, 4), (0, "held/h2", 0, 4), (24, "held/h1", 1, 4), (24, "held/h2", 0, 4)],
    ),
    # h1 at step 0: "1" and "2" tie, one of them right.
    "eval_outcomes": (
        {"k": 2, "benchmark": "held"},
        [
            *("step", "prompt_id", "num_samples", "num_correct"),
            *("avg_at_k", "maj_at_k", "response_length", "entropy"),
        ],
        [
            (0, "h1", 2, 1, 0.5, 0.5, 5, 0.5),
            (0, "h2", 2, 0, 0, 0, 5, 0.5),
            (24, "h1", 2, 2, 1, 1, 5, 0.5),
            (24, "h2", 2, 1, 0.5, 0.5, 5, 0.5),
        ],
    ),
    # The first token of each response is a digit; the last 10 of 24 steps hold step 20 only.
    "formal_sums": (
        {},
        ["prompt_id", "num_tokens", "num_formal"],
        [("a", 10, 2), ("b", 10, 2), ("c", 10, 2)],
    ),
}
