import math

# Sums of |d ln p| where p = 1/2 becomes .7, .6, .3, and .4 in a, and .4 and .6 in b.
SHIFT_A = math.log(1.4) + math.log(1.2) + math.log(1 / 0.6) + math.log(1 / 0.8)
SHIFT_B = math.log(1 / 0.8) + math.log(1.2)
# Movement and p (1 - p) of tokens of high and of low entropy, then their margins.
HIGH_LOW_A = (0.5, 1.5, 0.1, 1, 1.5, 1)
HIGH_LOW_B = (0.1, 1.25, 0.1, 1.25, 1.25, 1.25)

EXPECTED = {
    # Step 1: within prompt a, incorrect responses have 4 nats per token and correct ones 2, over 4 tokens together.
    "sign_entropy": (
        {},
        ["step", "prompt_id", "negative_sum", "positive_sum", "negative_mean", "positive_mean"],
        [
            (1, "a", 16, 8, 4, 2),
            (1, "b", 8, 4, 2, 1),
            (10, "a", 4, 4, 1, 1),
            (20, "a", 11, 7, 1.1, 0.7),
            (20, "b", 10, 5, 1, 0.5),
        ],
    ),
    "defect_sums": (
        {},
        ["step", "prompt_id", "defective", "responses"],
        [(1, "a", 1, 2), (1, "b", 1, 2), (10, "a", 0, 2), (20, "a", 0, 2), (20, "b", 0, 2), (20, "c", 0, 2)],
    ),
    "category_by_length": (
        {},
        ["step", "response_length", "tokens", "reasoning", "semantic"],
        [(1, 2, 8, 4, 4), (10, 2, 4, 4, 0), (20, 5, 30, 6, 24)],
    ),
    # Prompts a and c are one half, b is the other.
    "exchange_halves": (
        {},
        ["step", "half", "entropy_sum", "tokens", "correct", "responses"],
        [(1, 0, 6, 4, 1, 2), (1, 1, 12, 4, 1, 2), (10, 1, 4, 4, 1, 2), (20, 0, 7.5, 10, 1, 2), (20, 1, 11.5, 20, 3, 4)],
    ),
    # The responses of a group are equally long, so that length explains nothing.
    "ppl_halves": ({}, ["step", "prompt_id", "difference", "num_groups"], [(20, "a", 1, 1), (20, "b", -1, 1)]),
    # Top 20% of 20 tokens: one of 2 nats, and all of 1 nat, since they tie. A group of two has no third tercile. Every
    # first token is a digit and no other one is, so that nothing is left at equal position.
    "high_entropy_terciles": (
        {},
        ["step", "prompt_id", "low_tokens", "low_excess", "high_tokens", "high_excess"],
        [(20, "a", 2, 0, 0, 0), (20, "b", 5, 0, 0, 0)],
    ),
    # The top fifth is 4 of 20 tokens: two of .2 in a, and two of the four of .1, two of which lie in a and two in b. A
    # prompt gives its excess over the threshold .1, and .1 for a fifth of its tokens. p (1 - p) is 1/4 throughout,
    # and the margin less than 1, which counts as 1. All
    # gradient norms of 1 tie at the threshold of the top 20%, so that every token is above it.
    "movement_sums": (
        {},
        [
            *("prompt_id", "tokens", "movement", "still_tokens", "top_movement"),
            *("high_entropy_movement", "high_entropy_potential", "low_entropy_movement", "low_entropy_potential"),
            *("high_entropy_margin", "low_entropy_margin"),
            *("high_gradient_movement", "high_gradient_potential", "low_gradient_movement", "low_gradient_potential"),
            *("high_tokens", "high_movement", "positive_tokens", "positive_dp", "negative_tokens", "negative_dp"),
            *("uncertain_tokens", "uncertain_shift", "coarse_tokens"),
        ],
        [
            ("a", 10, 0.6, 6, 0.4, *HIGH_LOW_A, 0.6, 2.5, 0, 0, 6, 0.5, 2, 0.3, 4, -0.2, 10, SHIFT_A, 0),
            ("b", 10, 0.2, 8, 0.2, *HIGH_LOW_B, 0.2, 2.5, 0, 0, 5, 0.1, 0, 0, 5, -0.1, 10, SHIFT_B, 0),
        ],
    ),
    "movement_potential": ({}, ["step", "prompt_id", "bin", "tokens"], [(20, "a", 0, 10), (20, "b", 0, 10)]),
    # Eight high-entropy tokens past the first fifth, all of 1 nat, in eight of ten bins.
    "end_by_entropy": (
        {},
        ["prompt_id", "bin", "part", "tokens", "movement", "grad_norm"],
        [
            ("a", 0, 1, 1, 0.1, 2),
            *[("a", i, 0, 1, 0, 1) for i in (1, 2, 3)],
            *[("b", i, 0, 1, 0, 1) for i in (4, 5, 6)],
            ("b", 7, 1, 1, 0, 1),
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
