"""Define the trace: every table and column with its type, unit, and meaning.

The declarations below are the only source: the writer validates rows against them, the reader compares files with
them, and ``entrace tables`` prints them. A nullable column is null if its value was not captured or is unknown;
``unknown`` in ``run.json`` gives the reason. No float column holds NaN or infinity. Raise ``SCHEMA_VERSION`` when a
column is added or its meaning or type changes, and keep ``OLDEST_VERSION`` readable.

Version 2 added the columns with ``since=2``, and made nullable what other trainers do not record, such as ``reward``,
``is_correct``, ``logprob``, and ``entropy``. A file of version 2 may lack nullable columns of version 2. The views that
``open_runs`` creates have all columns for both versions. Columns with ``is_optional`` are in no file unless they were
recorded, so that they cost nothing otherwise; version 2 gained them later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.plain import plain

SCHEMA_VERSION = 2
OLDEST_VERSION = 1

VERSION_KEY = b"entrace_schema_version"

LIST_OF_STRINGS = pa.list_(pa.string())
NUMBERS_BY_NAME = pa.map_(pa.string(), pa.float32())

# Reasons to exclude a response from the update: a uniform group dropped by dynamic sampling, no verdict, or the length
# limit if the loss masks truncated responses.
DROP_REASONS = UNIFORM_GROUP, NO_VERDICT, TRUNCATED = "uniform_group", "no_verdict", "truncated"

# Files of tokens hold context as well: tokens inside a response that the policy did not generate. The view ``tokens``
# leaves them out, and this view has all rows.
RESPONSE_TOKENS = "response_tokens"


@dataclass(frozen=True)
class Column:
    """Declare one column.

    Attributes:
        name: Name of the column.
        type: Arrow type.
        unit: A unit, a range, or ``-``.
        meaning: Meaning in one sentence.
        nullable: Null is allowed, and writers may omit the column.
        is_measured: The column is float32 with a noisy mantissa, which determines its encoding.
        since: First schema version with the column.
        is_optional: Writers leave the column out of files, instead of writing nulls, unless it is recorded.
    """

    name: str
    type: pa.DataType
    unit: str
    meaning: str
    nullable: bool = False
    is_measured: bool = False
    since: int = 1
    is_optional: bool = False

    def may_be_absent_from(self, version: int) -> bool:
        """Return whether files of a version may lack the column, which is null then."""
        return self.since > version or (self.nullable and self.since == SCHEMA_VERSION)


@dataclass(frozen=True)
class Table:
    """Declare one table.

    ``sort_by`` orders the rows of each file and identifies a row within a run.
    """

    name: str
    grain: str
    columns: tuple[Column, ...]
    sort_by: tuple[str, ...]

    @cached_property
    def float_columns(self) -> tuple[Column, ...]:
        """Return the columns that must not hold NaN or infinity."""
        return tuple(column for column in self.columns if pa.types.is_floating(column.type))

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Return the Arrow schema, with unit and meaning in the metadata of each field."""
        fields = [
            pa.field(c.name, c.type, nullable=c.nullable, metadata={"unit": c.unit, "meaning": c.meaning})
            for c in self.columns
        ]
        return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode(), b"grain": self.grain.encode()})

    def schema_of(self, names: Sequence[str]) -> pa.Schema:
        """Return the Arrow schema of a file with the columns ``names``, in table order."""
        if len(names) == len(self.columns):
            return self.arrow_schema
        return pa.schema([self.arrow_schema.field(name) for name in names], metadata=self.arrow_schema.metadata)

    def describe(self) -> list[dict[str, str]]:
        """Return name, type, unit, and meaning of each column, as JSON holds them."""
        return [{"name": c.name, "type": str(c.type), "unit": c.unit, "meaning": c.meaning} for c in self.columns]


def check_version(place: str, found: object) -> int:
    """Return the schema version if this version of entrace can read it.

    The error names the location of the version as ``place``.

    Raises:
        InputError: the version is not readable.
    """
    readable = range(OLDEST_VERSION, SCHEMA_VERSION + 1)
    if version := next((version for version in readable if str(version) == str(found)), None):
        return version
    is_newer = str(found).isdigit() and int(str(found)) > SCHEMA_VERSION
    remedy = "; upgrade entrace to read newer traces" if is_newer else ""
    readable = f"{OLDEST_VERSION} to {SCHEMA_VERSION}"
    raise InputError(f"{place} {plain(str(found), 50)}, this version of entrace reads {readable}{remedy}")


def _measured(name: str, unit: str, meaning: str, since: int = 1, *, is_optional: bool = False) -> Column:
    return Column(
        name, pa.float32(), unit, meaning, nullable=True, is_measured=True, since=since, is_optional=is_optional
    )


RUN_ID = Column("run_id", pa.string(), "-", "Identifier of the run, unique within a study.")
STEP = Column("step", pa.int32(), "steps, from 1", "Training step that used the row.")
PROMPT_ID = Column("prompt_id", pa.string(), "-", "Identifier of the prompt.")
ROLLOUT_ID = Column(
    "rollout_id", pa.int64(), "-", "Identifier of the response, unique within the run and increasing with step."
)
RESPONSE_LENGTH = Column(
    "response_length", pa.int32(), "tokens", "Tokens of the response, including the end of sequence and context."
)
IS_CORRECT = Column("is_correct", pa.bool_(), "-", "The score reached correct_at; null if unknown or not judged.", True)
ANSWER_CLASS = Column(
    "answer_class",
    pa.string(),
    "-",
    "Class of answers to one prompt that the verifier considers equal; null = answers are compared as text.",
    nullable=True,
    since=2,
)

TOKENS = Table(
    "tokens",
    "one row per response token",
    (
        RUN_ID,
        STEP,
        PROMPT_ID,
        ROLLOUT_ID,
        Column("position", pa.int32(), "tokens, from 0", "Position of the token in its response."),
        RESPONSE_LENGTH,
        Column("token_id", pa.int32(), "-", "Vocabulary entry; its text is in table vocab."),
        Column("category", pa.string(), "-", "Function of the token; see analysis/trace/lexicon.toml."),
        _measured(
            "logprob",
            "nats",
            "ln p of the token under the distribution that it was sampled from; logprob_kind says who computed it.",
        ),
        _measured(
            "entropy",
            "nats",
            "Shannon entropy of that distribution; entropy_kind says over which part of the vocabulary.",
        ),
        Column("advantage", pa.float32(), "std of group reward", "Group-relative advantage before shaping.", True),
        Column("shaped_advantage", pa.float32(), "std of group reward", "The advantage that entered the loss.", True),
        _measured(
            "grad_norm",
            "nats",
            "Frobenius norm of the token's gradient at the LM head, "
            "|shaped_advantage| sqrt(1 - 2 p + sum p^2) |h| / temperature, before clipping and averaging.",
        ),
        IS_CORRECT,
        _measured("logprob_after", "nats", "logprob after the step's update; null if not computed again."),
        _measured("entropy_after", "nats", "entropy after the step's update; null if not computed again."),
        Column(
            "is_clipped", pa.bool_(), "-", "The ratio clip removed the token's gradient; null if not captured.", True
        ),
        Column(
            "is_kept",
            pa.bool_(),
            "-",
            "The token entered the update, as rollouts.is_kept; null if unknown.",
            True,
            since=2,
        ),
        _measured(
            "sampling_logprob",
            "nats",
            "ln p of the token as the inference engine reported it, beside the trainer's logprob.",
            since=2,
        ),
        _measured("reference_logprob", "nats", "ln p of the token under the reference policy.", since=2),
        Column(
            "loss_mask",
            pa.bool_(),
            "-",
            "False for context, such as tool output and user turns inside a response; null = the policy generated it. "
            "View tokens leaves context out, view response_tokens has it.",
            True,
            since=2,
        ),
        Column(
            "turn", pa.int32(), "from 0", "Turn of the conversation; null if the response is one turn.", True, since=2
        ),
        Column(
            "policy_version",
            pa.int32(),
            "-",
            "Version of the weights that sampled the token, as the trainer counts them.",
            True,
            since=2,
        ),
        _measured(
            "sum_p2_others",
            "-",
            "Sum of p^2 over all vocabulary entries except the token, under the distribution of logprob; "
            "null unless record.vocabulary_sums is set.",
            since=2,
            is_optional=True,
        ),
        _measured(
            "sum_p2_logp_others",
            "nats",
            "Sum of p^2 ln p over the entries of sum_p2_others; null unless record.vocabulary_sums is set.",
            since=2,
            is_optional=True,
        ),
        _measured(
            "reference_entropy",
            "nats",
            "Shannon entropy of the reference policy's distribution at the token; null unless record.reference is set.",
            since=2,
            is_optional=True,
        ),
    ),
    ("step", "rollout_id", "position"),
)

ROLLOUTS = Table(
    "rollouts",
    "one row per response, kept or dropped by dynamic sampling",
    (
        RUN_ID,
        STEP,
        PROMPT_ID,
        ROLLOUT_ID,
        Column(
            "group_id",
            pa.int64(),
            "-",
            "Identifier of the group of responses to one prompt that are sampled and compared together, "
            "unique within the run.",
            since=2,
        ),
        Column("sample_index", pa.int32(), "from 0", "Index of the response within its group."),
        Column("completion", pa.string(), "-", "Generated text without special tokens."),
        Column("answer", pa.string(), "-", "Answer extracted from the required format; null if none was found.", True),
        ANSWER_CLASS,
        Column("reward", pa.float32(), "-", "The verifier's score; the advantage uses reward + length_penalty.", True),
        Column(
            "length_penalty",
            pa.float32(),
            "-, at most 0",
            "Penalty for length; null if unknown, or if included in reward (version 1).",
            True,
            since=2,
        ),
        Column(
            "reward_components",
            NUMBERS_BY_NAME,
            "-",
            "Score of each reward function by name, before weighting; null if the reward has no parts.",
            True,
            since=2,
        ),
        IS_CORRECT,
        Column("has_answer", pa.bool_(), "-", "An answer could be parsed; false means a format violation.", True),
        Column(
            "defects",
            LIST_OF_STRINGS,
            "-",
            "Every defect that applies: format_violation, truncated, repetition, irrelevant; empty if none.",
        ),
        RESPONSE_LENGTH,
        Column(
            "generated_length",
            pa.int32(),
            "tokens",
            "Tokens of the response that the policy generated; null if all of them.",
            True,
            since=2,
        ),
        Column("is_truncated", pa.bool_(), "-", "Generation stopped at the length limit.", True),
        Column("is_kept", pa.bool_(), "-", "The response entered the update; drop_reason says why not."),
        Column(
            "drop_reason",
            pa.string(),
            "-",
            f"Reason for exclusion from the update: {', '.join(DROP_REASONS)}; null if included or unknown.",
            True,
            since=2,
        ),
        Column("entropy_mean", pa.float32(), "nats per token", "Mean token entropy of the response.", True),
        Column(
            "surprisal_mean", pa.float32(), "nats per token", "Mean of -logprob over the tokens of the response.", True
        ),
        Column("ppl", pa.float32(), ">= 1", "Perplexity exp(surprisal_mean) of the response.", True),
        Column("ppl_z", pa.float32(), "standard deviations", "ln ppl standardized within the group.", True),
        Column(
            "advantage", pa.float32(), "std of group reward", "Group-relative advantage; 0 in uniform groups.", True
        ),
        Column("temperature", pa.float32(), "-", "Sampling temperature, included in every recorded probability.", True),
        Column(
            "entropy_kind",
            pa.string(),
            "-",
            "exact = over the whole vocabulary; top_k = over the entries an engine reported; null if not recorded.",
            True,
        ),
        Column(
            "logprob_kind",
            pa.string(),
            "-",
            "Who computed logprob: trainer, engine, or rescored (a teacher-forced pass of entrace import); "
            "null if not recorded.",
            True,
            since=2,
        ),
        Column("policy_step", pa.int32(), "steps", "Updates applied to the sampling policy.", True),
    ),
    ("step", "rollout_id"),
)

PROMPTS = Table(
    "prompts",
    "one row per prompt",
    (
        RUN_ID,
        PROMPT_ID,
        Column("split", pa.string(), "-", "train or heldout."),
        Column("task", pa.string(), "-", "Source of the prompt and verifier that scores it."),
        Column("prompt", pa.string(), "-", "The question as passed to the chat template."),
        Column("ground_truth", pa.string(), "-", "Reference answer of the verifier.", True),
        Column("difficulty", pa.string(), "JSON", "The task's own description of difficulty.", True),
    ),
    ("prompt_id",),
)

VOCAB = Table(
    "vocab",
    "one row per vocabulary entry",
    (
        RUN_ID,
        Column("token_id", pa.int32(), "-", "Vocabulary entry."),
        Column(
            "text",
            pa.string(),
            "-",
            "Text of the entry decoded alone; a byte of an incomplete character appears as <0xF0>.",
        ),
        Column("category", pa.string(), "-", "Function of the entry; see analysis/trace/lexicon.toml."),
        Column("is_special", pa.bool_(), "-", "The tokenizer marks it as special; null if unknown.", True, since=2),
    ),
    ("token_id",),
)

STEPS = Table(
    "steps",
    "one row per training step",
    (
        RUN_ID,
        STEP,
        Column("loss", pa.float32(), "-", "Loss with its KL and entropy terms, averaged over optimizer steps.", True),
        Column(
            "reward_mean",
            pa.float32(),
            "-",
            "Mean reward over all responses with a verdict, including dropped ones.",
            True,
        ),
        Column(
            "accuracy",
            pa.float32(),
            "[0, 1]",
            "Share of correct responses among those with a verdict, including dropped groups.",
            True,
        ),
        Column("format_rate", pa.float32(), "[0, 1]", "Share of all sampled responses with a parsable answer.", True),
        Column("entropy_token_mean", pa.float32(), "nats", "Mean token entropy over all sampled tokens.", True),
        Column(
            "kl",
            pa.float32(),
            "nats",
            "Mean KL estimate to the reference policy; null without a reference policy.",
            True,
        ),
        Column(
            "clip_frac_low", pa.float32(), "[0, 1]", "Share of tokens whose ratio fell below 1 - clip_low, A < 0.", True
        ),
        Column(
            "clip_frac_high",
            pa.float32(),
            "[0, 1]",
            "Share of tokens whose ratio rose above 1 + clip_high, A > 0.",
            True,
        ),
        Column(
            "clip_frac_dual",
            pa.float32(),
            "[0, 1]",
            "Share of tokens whose ratio rose above loss.dual_clip, A < 0; null if unknown.",
            True,
            since=2,
        ),
        Column("grad_norm", pa.float32(), "-", "Global gradient norm before clipping, averaged over updates.", True),
        Column("lr", pa.float32(), "-", "Learning rate of the step.", True),
        Column("tokens", pa.int64(), "tokens", "Generated tokens, including dropped groups."),
        Column("groups_kept", pa.int32(), "groups", "Groups that entered the update.", True),
        Column(
            "groups_dropped",
            pa.int32(),
            "groups",
            "Groups left out of the update, such as those with uniform outcomes.",
            True,
        ),
        Column("is_shaped", pa.bool_(), "-", "The shaping method was active at this step.", True),
        Column("rollout_s", pa.float32(), "s", "Time for sampling.", True),
        Column("reward_s", pa.float32(), "s", "Time for scoring answers.", True),
        Column("update_s", pa.float32(), "s", "Time for forward pass, backward pass, and optimizer.", True),
        Column(
            "record_s",
            pa.float32(),
            "s",
            "Time for after-update values, other extra passes, and writing the trace.",
            True,
        ),
    ),
    ("step",),
)

EVALS = Table(
    "evals",
    "one row per held-out response",
    (
        RUN_ID,
        Column("step", pa.int32(), "steps, 0 = base policy", "Updates applied to the evaluated policy."),
        Column("benchmark", pa.string(), "-", "Name of the held-out set."),
        PROMPT_ID,
        Column(
            "sample_index", pa.int32(), "from 0", "Index of the sample; runs share random numbers at equal indices."
        ),
        Column("answer", pa.string(), "-", "Extracted answer; null if none was found.", True),
        ANSWER_CLASS,
        IS_CORRECT,
        Column(
            "reward", pa.float32(), "-", "Score of the response; null if only its correctness is known.", True, since=2
        ),
        RESPONSE_LENGTH,
        Column("entropy_mean", pa.float32(), "nats per token", "Mean token entropy of the response.", True),
        Column("temperature", pa.float32(), "-", "Sampling temperature.", True),
    ),
    ("step", "benchmark", "prompt_id", "sample_index"),
)

INTERVENTIONS = Table(
    "interventions",
    "one row per replaced token, written by `entrace intervene`",
    (
        RUN_ID,
        Column(
            "checkpoint_step",
            pa.int32(),
            "steps",
            "Updates applied to the policy that sampled alternatives and continuations.",
        ),
        Column("seed", pa.int32(), "-", "Seed for the choice of tokens, alternatives, and continuations."),
        Column(
            "selection",
            pa.string(),
            "-",
            "Limits on entropy quantile, position, and perplexity tercile of candidate tokens.",
            True,
            since=2,
        ),
        Column("temperature", pa.float32(), "-", "Sampling temperature of the continuations.", True, since=2),
        STEP,
        PROMPT_ID,
        ROLLOUT_ID,
        Column("position", pa.int32(), "tokens, from 0", "Position of the replaced token in its response."),
        RESPONSE_LENGTH,
        Column("token_id", pa.int32(), "-", "Vocabulary entry of the original token."),
        Column("category", pa.string(), "-", "Function of the original token."),
        Column("alternative_id", pa.int32(), "-", "Vocabulary entry of the replacement."),
        Column("logprob", pa.float32(), "nats", "logprob of the original token, recorded when it was sampled."),
        Column("entropy", pa.float32(), "nats", "entropy at the original token, recorded when it was sampled."),
        Column("ppl", pa.float32(), ">= 1", "Perplexity of the response."),
        Column(
            "ppl_tercile", pa.int32(), "1, 2, 3", "Tercile of the response by perplexity within its group; 1 = lowest."
        ),
        Column("is_correct", pa.bool_(), "-", "The response was recorded as correct: its score reached correct_at."),
        Column("num_continuations", pa.int32(), "responses", "Continuations sampled from each of the two prefixes."),
        Column(
            "accuracy_original",
            pa.float32(),
            "[0, 1]",
            "Share of correct continuations of the prefix with the original token.",
        ),
        Column(
            "accuracy_alternative",
            pa.float32(),
            "[0, 1]",
            "Share of correct continuations of the prefix with the replacement.",
        ),
        Column("impact", pa.float32(), "[-1, 1]", "accuracy_original - accuracy_alternative."),
        Column("tokens", pa.int64(), "tokens", "Tokens generated for this row."),
    ),
    ("checkpoint_step", "seed", "step", "rollout_id", "position"),
)

TABLES: dict[str, Table] = {t.name: t for t in (TOKENS, ROLLOUTS, PROMPTS, VOCAB, STEPS, EVALS, INTERVENTIONS)}
