"""Define the simulated worlds: description, parameters, and expected verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tests.calibration.parameters import MethodWorld, UpdateWorld, World

# Expectations. A null part must earn no verdict. A part that is "not supported" may be contradicted.
NULL, SUPPORTED, CONTRADICTED, NOT_SUPPORTED, INCONCLUSIVE = (
    "null",
    "supported",
    "contradicted",
    "not supported",
    "inconclusive",
)
METHOD_CLAIMS = ("M1", "M2", "M3", "I3")
UPDATE_CLAIMS = ("E5",)


@dataclass(frozen=True)
class Entry:
    """Describe a world to judge.

    Attributes:
        about: Description in one sentence.
        world: Parameters.
        default: Expectation of parts that ``expected`` does not name; None if they are not counted.
        expected: Expectation by ``claim/part`` or by claim.
        is_covered: Count the coverage of intervals.
    """

    about: str
    world: World | MethodWorld | UpdateWorld
    default: str | None = NULL
    expected: Mapping[str, str | None] = field(default_factory=dict)
    is_covered: bool = True

    def expectation(self, part: str) -> str | None:
        """Return the expectation of ``claim/part``; None for a figure.

        A run has no information about methods, and an ablation about nothing else. Only runs with many evaluations have
        information about the changes between them, and they have it about nothing else.
        """
        claim = part.partition("/")[0]
        if claim == "figure":
            return None
        for claims, kind in ((METHOD_CLAIMS, MethodWorld), (UPDATE_CLAIMS, UpdateWorld)):
            if (claim in claims) != isinstance(self.world, kind):
                return NULL
        return self.expected.get(part, self.expected.get(claim, self.default))


RESPONSES = World()
TOKENS = World(has_tokens=True, has_interventions=True)
# The law does not capture drift of accuracy that is unrelated to entropy: a contradiction is correct, support is not.
UNRELATED: dict[str, str | None] = {"E1/fit": NOT_SUPPORTED}
FLAT = replace(RESPONSES, course="flat", accuracy=(0.5, 0.5))
PLANTED = replace(
    TOKENS,
    negative_entropy=(0.8, 0.3),
    positive_entropy=(0.4, 0.22),
    reasoning=(0.30, 0.40),
    defects=(0.40, 0.20),
    ends=(1.4, 1.3),
    reasoning_by_ppl=0.08,
    update="learned",
    push=0.7,
    end_movement=1.5,
    end_gradient=1.4,
    impact_by_ppl=0.2,
    impact_slope=0.3,
)
REVERSED = replace(
    TOKENS,
    negative_entropy=(0.4, 0.22),
    positive_entropy=(0.8, 0.3),
    reasoning=(0.40, 0.30),
    defects=(0.20, 0.40),
    ends=(0.7, 0.7),
    reasoning_by_ppl=-0.08,
    update="even",
    push=-0.7,
    end_movement=0.6,
    end_gradient=0.6,
    impact_by_ppl=-0.2,
    impact_slope=-0.3,
)

# These claims hold in a run of two lines; their parts are compared with the truth.
# A random update changes high entropies most, so entropy may predict its own change; no formula does.
STAGES = {"S1": None, "E1": None, "E3": NOT_SUPPORTED}
# A smooth course does not have two stages. The difference between its halves depends on the course.
SMOOTH = {"S1": None, "E1": None, "S1/two stages": NOT_SUPPORTED}
STEADY = {**SMOOTH, "S1/entropy slows": NULL, "S1/accuracy slows": NULL}
FASTER = {**SMOOTH, "S1/entropy slows": CONTRADICTED, "S1/accuracy slows": CONTRADICTED}
NO_UPDATE = {**STAGES, **dict.fromkeys(("E2", "E3", "E4", "S5", "S6", "T3"), NULL)}
# Movement by sign alone: what formulas make of it depends on the cells of the nulls.
BY_SIGN: dict[str, str | None] = dict.fromkeys(("E2", "E3", "E4"))
LAWFUL = {
    **STAGES,
    **BY_SIGN,
    "E2/discriminator": SUPPORTED,
    "E2/quadrants": SUPPORTED,
    "E3/discriminator": SUPPORTED,
    "E4": SUPPORTED,
    "S6": None,
    "S5": None,
    "T3": None,
}


def _of(course: str, about: str, expected: Mapping[str, str | None]) -> Entry:
    return Entry(about, replace(RESPONSES, course=course), expected=expected)


def _at(low: float, high: float) -> Entry:
    world = replace(
        RESPONSES, accuracy=(low, high), negative_entropy=(0.6, 0.4), positive_entropy=(0.42, 0.28), difficulty=0.5
    )
    about = f"All responses lose a third of their entropy while accuracy rises from {low:.0%} to {high:.0%}."
    return Entry(about, world, expected={**STAGES, "I1/accuracy": None})


def _autocorrelated(rho: float) -> Entry:
    about = f"Two stages and nothing else; the policy's states have autocorrelation {rho:g}."
    return Entry(about, replace(TOKENS, rho=rho, drift=2.0), expected=STAGES)


def _drifting(rho: float) -> Entry:
    about = f"Entropy and accuracy drift independently, without trend, with autocorrelation {rho:g}."
    world = replace(FLAT, rho=rho, drift=3.0, hard_entropy=0.3)
    return Entry(about, world, default=INCONCLUSIVE if rho > 0.9 else NULL, expected=UNRELATED)


# Updates follow the gradient of the policy, to which the formulas are approximations of different quality.
FOLLOWED = UpdateWorld(rate=0.5, eval_noise=0.01)
BY_GRADIENT: dict[str, str | None] = {"E5/covariance": SUPPORTED, "E5/discriminator": SUPPORTED}

BETTER = MethodWorld(accuracy=0.15, length=0.2, formal=0.1)
WORSE = MethodWorld(accuracy=-0.15, length=-0.2, formal=-0.1)

WORLDS: dict[str, Entry] = {
    "frozen": Entry("A frozen policy and prompts of equal entropy.", replace(FLAT, drift=0.0)),
    "frozen-unequal": Entry(
        "A frozen policy; hard prompts have higher entropy and lower accuracy.",
        replace(FLAT, drift=0.0, hard_entropy=0.4, difficulty=1.5),
    ),
    "frozen-rounding": Entry(
        "A frozen policy, prompts of unequal difficulty, after-update values that differ by float32 rounding.",
        replace(
            TOKENS,
            course="flat",
            accuracy=(0.5, 0.5),
            drift=0.0,
            hard_entropy=0.4,
            difficulty=1.5,
            update="float32",
            groups=16,
        ),
    ),
    **{f"drift-{rho:g}": _drifting(rho) for rho in (0.0, 0.5, 0.9, 0.95)},
    "steps-only": Entry(
        "Drift without trend, recorded only as metrics of each step: few rows are judged.",
        replace(FLAT, has_responses=False, rho=0.9, drift=3.0),
    ),
    "linear": _of("linear", "Entropy falls and accuracy rises along a line.", STEADY),
    **{
        f"exponential-{k}": _of(
            f"exponential, {k} time constant{'s' * (k > 1)}",
            f"Exponential decay over {k} time constant{'s' * (k > 1)}.",
            SMOOTH,
        )
        for k in (1, 2, 3, 4)
    },
    "logarithm": _of("logarithm", "Logarithmic course.", SMOOTH),
    "sigmoid": _of("sigmoid", "Sigmoid course, fastest in the middle of the run.", STEADY),
    "non-monotone": _of("there and back", "Entropy falls and returns, accuracy rises and returns.", STEADY),
    "slow-then-fast": _of("slow then fast", "Slow at first, fast after 60% of the run.", FASTER),
    "rising-entropy": Entry(
        "Entropy rises along two lines while accuracy rises.",
        replace(RESPONSES, negative_entropy=(0.25, 0.6), positive_entropy=(0.25, 0.6)),
        expected={**STAGES, "E1/association": NOT_SUPPORTED, "S1/entropy slows": CONTRADICTED},
    ),
    "entropy-first": Entry(
        "Entropy falls in the first third of the run, accuracy rises in the last third.",
        replace(RESPONSES, course="early", accuracy_course="late"),
        expected={
            **SMOOTH,
            "S1/entropy slows": SUPPORTED,
            "E1/fit": NOT_SUPPORTED,
            "E1/association": NOT_SUPPORTED,
        },
    ),
    "reversed-exchange": Entry(
        "Entropy and accuracy fall together, along two lines.",
        replace(RESPONSES, accuracy=(0.8, 0.4)),
        expected={**STAGES, "E1/association": CONTRADICTED, "S1/accuracy slows": CONTRADICTED},
    ),
    "accuracy-10": _at(0.08, 0.22),
    "accuracy-50": _at(0.4, 0.6),
    "accuracy-90": _at(0.78, 0.92),
    **{f"two-stages-{rho:g}": _autocorrelated(rho) for rho in (0.0, 0.5, 0.9, 0.95)},
    "no-update": Entry("Two stages; no update moves any token.", replace(TOKENS, update="none"), expected=NO_UPDATE),
    "rounding-float32": Entry(
        "Two stages; after-update values differ only by float32 rounding.",
        replace(TOKENS, update="float32"),
        expected=NO_UPDATE,
    ),
    "rounding-bf16": Entry(
        "Two stages; after-update values differ only by bfloat16 rounding.",
        replace(TOKENS, update="bf16"),
        expected=NO_UPDATE,
    ),
    "random-update": Entry(
        "Two stages; updates change logits at random, with standard deviation 1.",
        replace(TOKENS, update_size=1.0),
        expected=STAGES,
    ),
    "lawful": Entry(
        "Two stages; the logit of each token moves in proportion to its advantage, so that S* predicts entropy.",
        replace(TOKENS, law=1.5),
        expected=LAWFUL,
    ),
    "lawless": Entry(
        "Two stages; the logit of each token moves against its advantage, so that S* has the wrong sign.",
        replace(TOKENS, law=-1.5),
        expected={
            **LAWFUL,
            **dict.fromkeys(("E2/discriminator", "E2/quadrants", "E3/discriminator", "E4"), CONTRADICTED),
        },
    ),
    "longer": Entry(
        "Lengths double over training; entropy and reasoning tokens depend on position only.",
        replace(TOKENS, groups=16, growth=1.0, position_entropy=0.3, position_reasoning=0.1),
        expected={**STAGES, "T1": None},
    ),
    "wrong-longer": Entry(
        "Incorrect responses are 50% longer, and entropy rises with length; nothing else differs.",
        replace(TOKENS, groups=16, wrong_length=0.5, length_entropy=0.5),
        expected=STAGES,
    ),
    "end": Entry(
        "Entropy is higher at the end of responses; nothing else differs.",
        replace(TOKENS, ends=(1.0, 1.5)),
        expected={**STAGES, "T1/end": SUPPORTED},
    ),
    "capture-20": Entry(
        "After-update values only at every 20th step, autocorrelation .9.",
        replace(TOKENS, capture_every=20, rho=0.9),
        expected=STAGES,
    ),
    "small-groups": Entry("16 prompts with four responses each.", replace(TOKENS, groups=16, group=4), expected=STAGES),
    "heavy-tails": Entry(
        "Noise of tokens, responses, and updates follows Student's t with 3 degrees of freedom.",
        replace(TOKENS, is_heavy_tailed=True),
        expected=STAGES,
    ),
    "uniform-groups": Entry(
        "Half of the groups are uniform and dropped: accuracy near 90%, very unequal prompts.",
        replace(TOKENS, accuracy=(0.75, 0.9), difficulty=2.0),
        expected=STAGES,
    ),
    "recurring-prompts": Entry(
        "Recurring prompts: 24 of 64 at every step.",
        replace(TOKENS, pool=64, hard_entropy=0.2),
        expected=STAGES,
    ),
    "combined": Entry(
        "All nuisances together: unequal prompts, autocorrelation .9, growing lengths, longer incorrect responses, "
        "heavy tails, capture every 20 steps, 16 groups of 4.",
        replace(
            TOKENS,
            groups=16,
            group=4,
            difficulty=1.5,
            hard_entropy=0.2,
            rho=0.9,
            growth=0.5,
            wrong_length=0.3,
            length_entropy=0.3,
            position_reasoning=0.1,
            capture_every=20,
            is_heavy_tailed=True,
        ),
        expected=STAGES,
        is_covered=False,
    ),
    "planted": Entry(
        "All claimed effects, in three seeds, the size of the default study.",
        replace(PLANTED, runs=3),
        default=SUPPORTED,
        expected=BY_SIGN,
    ),
    "planted-1": Entry("All claimed effects, in one run.", PLANTED, default=None),
    "planted-0.9": Entry(
        "All claimed effects, in one run with autocorrelation .9.", replace(PLANTED, rho=0.9), default=None
    ),
    "reversed": Entry(
        "Two stages, and the opposite of all other claimed effects, in three seeds.",
        replace(REVERSED, runs=3),
        default=CONTRADICTED,
        expected={**STAGES, **BY_SIGN},
    ),
    "frozen-unequal-3": Entry(
        "A frozen policy in three seeds; hard prompts have higher entropy and lower accuracy.",
        replace(FLAT, drift=0.0, hard_entropy=0.4, difficulty=1.5, runs=3),
    ),
    "two-stages-0.9-3": Entry(
        "Two stages and nothing else, autocorrelation .9, in three seeds.",
        replace(TOKENS, rho=0.9, drift=2.0, runs=3),
        expected=STAGES,
    ),
    "evaluations-frozen": Entry("Evaluations after every step of a frozen policy.", UpdateWorld(update="none")),
    "evaluations-random": Entry(
        "Evaluations after every step; updates change logits at random.", UpdateWorld(update="random")
    ),
    "evaluations-random-decay": Entry(
        "Evaluations after every step; updates change logits at random, and less and less.",
        UpdateWorld(update="random", decay=3.0),
    ),
    "evaluations-sharpen": Entry(
        "Evaluations after every step; the policy loses entropy along a curve, whatever it samples.",
        UpdateWorld(update="sharpen"),
    ),
    "evaluations-by-size": Entry(
        "Evaluations after every step; every update costs entropy in proportion to its size, whatever it reinforces.",
        UpdateWorld(update="sharpen by size"),
    ),
    "evaluations-random-3": Entry(
        "Evaluations after every step; updates change logits at random, in three seeds of 30 steps.",
        UpdateWorld(steps=30, update="random", runs=3),
    ),
    "evaluations-few": Entry(
        "Evaluations after every tenth step of 60; updates follow the gradient.",
        replace(FOLLOWED, steps=60, eval_every=10),
        default=INCONCLUSIVE,
    ),
    "evaluations-lawful": Entry(
        "Evaluations after every step; updates follow the gradient.", FOLLOWED, default=None, expected=BY_GRADIENT
    ),
    "evaluations-lawful-3": Entry(
        "Evaluations after every step; updates follow the gradient, in three seeds of 60 steps.",
        replace(FOLLOWED, steps=60, runs=3),
        default=None,
        expected=BY_GRADIENT,
    ),
    "evaluations-lawless": Entry(
        "Evaluations after every step; updates go against the gradient.",
        replace(FOLLOWED, update="against"),
        default=None,
        expected=dict.fromkeys(BY_GRADIENT, CONTRADICTED),
    ),
    "equal-arms": Entry("Equal arms, five seeds.", MethodWorld()),
    "equal-arms-3": Entry("Equal arms, three seeds.", MethodWorld(seeds=3)),
    "noisy-arm": Entry("Equal arms; arm ppl varies four times as much over seeds.", MethodWorld(spread=4.0)),
    "two-benchmarks": Entry(
        "Equal arms; two benchmarks whose last evaluations are at different steps.",
        MethodWorld(last_steps=(6, 10)),
    ),
    "better-arms": Entry("Better, longer, and more formal arms.", BETTER, default=SUPPORTED),
    "better-two-benchmarks": Entry(
        "Better arms; two benchmarks whose last evaluations are at different steps.",
        replace(BETTER, last_steps=(6, 10)),
        default=SUPPORTED,
    ),
    "worse-arms": Entry("Worse, shorter, and less formal arms.", WORSE, default=CONTRADICTED),
}
