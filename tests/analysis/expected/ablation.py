# Two prompts of 1 each: Wilson's interval with t(.975, 1) = 12.7062 begins at 1 / (1 + t^2 / 2). Two prompts that
# differ leave one degree of freedom, with which the interval of their mean spans all shares, to six digits.
LOW = 1 / (1 + 12.706205**2 / 2)

EXPECTED = {
    # Two prompts with values 0.5 and 0, 1 and 0.5.
    "ablation_curves": (
        {},
        ["arm", "seed", "step", "avg_at_k", "low", "high", "response_length", "entropy", "k", "num_prompts"],
        [
            ("none", 0, 0, 0.25, 0, 1, 5, 0.5, 2, 2),
            ("none", 0, 24, 0.75, 0, 1, 5, 0.5, 2, 2),
        ],
    ),
    # Of two samples each h1 has two right, h2 one.
    "performance_profile": (
        {},
        ["arm", "seed", "benchmark", "step", "tau", "share", "low", "high", "k", "num_prompts"],
        [
            ("none", 0, "held", 24, 0, 1, LOW, 1, 2, 2),
            ("none", 0, "held", 24, 0.5, 0.5, 0, 1, 2, 2),
        ],
    ),
    # 24 steps of 8 tokens; no phase took any time.
    "cost_accuracy": (
        {},
        ["arm", "seed", "benchmark", "step", "avg_at_k", "low", "high", "k", "num_prompts", "tokens", "seconds"],
        [("none", 0, "held", 24, 0.75, 0, 1, 2, 2, 192, 0)],
    ),
    # One run is no pair; test_figures.py has pairs.
    "paired_differences": ({"baselines": {"key": ["none"], "value": ["none"]}}, ["arm", "seed", "difference"], []),
    # maj: h1 is unanimous; h2 ties between a wrong and a right answer.
    "ablation_final": (
        {"k": 2},
        ["arm", "step", "metric", "value", "low", "high", "k", "num_prompts"],
        [
            ("none", 24, "avg_at_k", 0.75, 0, 1, 2, 2),
            ("none", 24, "entropy", 0.5, 0.5, 0.5, 2, 2),
            ("none", 24, "maj_at_k", 0.75, 0, 1, 2, 2),
            ("none", 24, "pass_at_k", 1, LOW, 1, 2, 2),
            ("none", 24, "response_length", 5, 5, 5, 2, 2),
        ],
    ),
}
