"""The trace contract: every table, column, type, unit and meaning, in one place.

Arrow schemas are built from the declarations below, the writer validates against them, the reader compares files
with them, and ``entrace tables`` prints them. A nullable column is null where its value was not captured or is unknown;
``unknown`` in ``run.json`` gives the reason. No float column holds NaN or infinity. Raise ``SCHEMA_VERSION`` when a
column is added or changes its meaning or type, and keep ``OLDEST_VERSION`` readable.

Version 2 added the columns with ``since=2`` and made ``is_correct`` and ``reward`` nullable. The views of
``runs`` show the same columns for both versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from entrace.analysis.trace.errors import InputError
from entrace.analysis.trace.plain import plain

SCHEMA_VERSION = 2
OLDEST_VERSION = 1

VERSION_KEY = b"entrace_schema_version"

LIST_OF_STRINGS = pa.list_(pa.string())


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: The field's term.
        type: Arrow type.
        unit: A unit, a range or ``-``.
        meaning: In a sentence.
        nullable: May be left out when writing.
        is_measured: float32 whose mantissa is noise, which decides how it is encoded.
        since: First schema version with the column.
    """

    name: str
    type: pa.DataType
    unit: str
    meaning: str
    nullable: bool = False
    is_measured: bool = False
    since: int = 1


@dataclass(frozen=True)
class Table:
    """One table of a trace; ``sort_by`` is the order of rows within each file and identifies a row within a run."""

    name: str
    grain: str
    columns: tuple[Column, ...]
    sort_by: tuple[str, ...]

    @cached_property
    def float_columns(self) -> tuple[Column, ...]:
        """Columns that must not hold NaN or infinity."""
        return tuple(column for column in self.columns if pa.types.is_floating(column.type))

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Arrow schema whose field metadata carry unit and meaning."""
        fields = [
            pa.field(c.name, c.type, nullable=c.nullable, metadata={"unit": c.unit, "meaning": c.meaning})
            for c in self.columns
        ]
        return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION).encode(), b"grain": self.grain.encode()})


def check_version(place: str, found: object) -> int:
    """Return a schema version that this version of entrace reads; ``place`` names where it was found.

    Raises:
        InputError: another version.
    """
    readable = range(OLDEST_VERSION, SCHEMA_VERSION + 1)
    if version := next((version for version in readable if str(version) == str(found)), None):
        return version
    is_newer = str(found).isdigit() and int(str(found)) > SCHEMA_VERSION
    remedy = "; upgrade entrace to read newer traces" if is_newer else ""
    readable = f"{OLDEST_VERSION} to {SCHEMA_VERSION}"
    raise InputError(f"{place} {plain(str(found), 50)}, this version of entrace reads {readable}{remedy}")


def _measured(name: str, unit: str, meaning: str, *, nullable: bool = False) -> Column:
    return Column(name, pa.float32(), unit, meaning, nullable, is_measured=True)


RUN_ID = Column("run_id", pa.string(), "-", "The run; unique within a study.")
STEP = Column("step", pa.int32(), "steps, from 1", "Training step that consumed the row.")
PROMPT_ID = Column("prompt_id", pa.string(), "-", "The prompt.")
ROLLOUT_ID = Column("rollout_id", pa.int64(), "-", "The response; unique within the run, rising with step.")
RESPONSE_LENGTH = Column("response_length", pa.int32(), "tokens", "Generated tokens, end of sequence included.")
IS_CORRECT = Column("is_correct", pa.bool_(), "-", "Its score reached correct_at; null if unknown or not judged.", True)
ANSWER_CLASS = Column(
    "answer_class",
    pa.string(),
    "-",
    "Answers to one prompt that the verifier considers equal share a class; null = answers compare as text.",
    nullable=True,
    since=2,
)

TOKENS = Table(
    "tokens",
    "one row per generated token",
    (
        RUN_ID,
        STEP,
        PROMPT_ID,
        ROLLOUT_ID,
        Column("position", pa.int32(), "tokens, from 0", "Place of the token in its response."),
        RESPONSE_LENGTH,
        Column("token_id", pa.int32(), "-", "Vocabulary entry; text in table vocab."),
        Column("category", pa.string(), "-", "Function of the token; see analysis/trace/lexicon.toml."),
        _measured("logprob", "nats", "ln p of the token under the distribution it was sampled from."),
        _measured("entropy", "nats", "Shannon entropy of that distribution, whole vocabulary."),
        Column("advantage", pa.float32(), "std of group reward", "Group-relative advantage before shaping."),
        Column("shaped_advantage", pa.float32(), "std of group reward", "The advantage that entered the loss."),
        _measured(
            "grad_norm",
            "nats",
            "Frobenius norm of the token's gradient at the LM head, "
            "|shaped_advantage| sqrt(1 - 2 p + sum p^2) |h| / temperature, before clipping and averaging.",
        ),
        IS_CORRECT,
        _measured("logprob_after", "nats", "logprob after the step's update; null if not scored again.", nullable=True),
        _measured("entropy_after", "nats", "entropy after the step's update; null if not scored again.", nullable=True),
        Column("is_clipped", pa.bool_(), "-", "The ratio clip took the token's gradient; null if not captured.", True),
        Column(
            "is_kept", pa.bool_(), "-", "Took part in the update, as rollouts.is_kept; null if unknown.", True, since=2
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
            "The group: responses to one prompt, sampled and compared together; unique within the run.",
            since=2,
        ),
        Column("sample_index", pa.int32(), "from 0", "Index of the response within its group."),
        Column("completion", pa.string(), "-", "Generated text, special tokens left out."),
        Column("answer", pa.string(), "-", "Answer extracted from the required format; null if there is none.", True),
        ANSWER_CLASS,
        Column("reward", pa.float32(), "-", "The verifier's score; the advantage is of reward + length_penalty.", True),
        Column(
            "length_penalty",
            pa.float32(),
            "-, at most 0",
            "Deduction for length; null if unknown, or, in version 1, part of reward.",
            True,
            since=2,
        ),
        IS_CORRECT,
        Column("has_answer", pa.bool_(), "-", "An answer could be parsed; false is a format violation.", True),
        Column(
            "defects",
            LIST_OF_STRINGS,
            "-",
            "Every defect that applies: format_violation, truncated, repetition, irrelevant; empty if none.",
        ),
        RESPONSE_LENGTH,
        Column("is_truncated", pa.bool_(), "-", "Stopped by the length limit.", True),
        Column("is_kept", pa.bool_(), "-", "Took part in the update; drop_reason says why not."),
        Column(
            "drop_reason",
            pa.string(),
            "-",
            "Why it took no part in the update: uniform_group, no_verdict, truncated; null if it did, or unknown.",
            True,
            since=2,
        ),
        Column("entropy_mean", pa.float32(), "nats per token", "Mean token entropy of the response.", True),
        Column("surprisal_mean", pa.float32(), "nats per token", "Mean of -logprob over the response.", True),
        Column("ppl", pa.float32(), ">= 1", "Perplexity exp(surprisal_mean) of the response.", True),
        Column("ppl_z", pa.float32(), "standard deviations", "ln ppl standardised within the group.", True),
        Column("advantage", pa.float32(), "std of group reward", "Group-relative advantage; 0 in uniform groups."),
        Column("temperature", pa.float32(), "-", "Sampling temperature, part of every recorded probability."),
        Column("entropy_kind", pa.string(), "-", "exact: over the whole vocabulary."),
        Column("policy_step", pa.int32(), "steps", "Updates that the sampling policy had received.", True),
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
        Column("task", pa.string(), "-", "Where the prompt comes from and which verifier scores it."),
        Column("prompt", pa.string(), "-", "The question as put to the chat template."),
        Column("ground_truth", pa.string(), "-", "The answer that the verifier compares with.", True),
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
        Column("text", pa.string(), "-", "Its text, decoded alone; bytes of an incomplete character as <0xF0>."),
        Column("category", pa.string(), "-", "Its function; see analysis/trace/lexicon.toml."),
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
        Column("loss", pa.float32(), "-", "Token-mean loss, averaged over mini-batches and epochs.", True),
        Column("reward_mean", pa.float32(), "-", "Mean reward over all responses with a verdict, dropped or not."),
        Column("accuracy", pa.float32(), "[0, 1]", "Share of correct among all sampled responses."),
        Column(
            "format_rate", pa.float32(), "[0, 1]", "Share with a parsable answer among all sampled responses.", True
        ),
        Column("entropy_token_mean", pa.float32(), "nats", "Mean token entropy over all sampled tokens."),
        Column("kl", pa.float32(), "nats", "Mean KL estimate to the reference policy; null without one.", True),
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
        Column("grad_norm", pa.float32(), "-", "Global gradient norm before clipping, mean over updates.", True),
        Column("lr", pa.float32(), "-", "Learning rate of the step.", True),
        Column("tokens", pa.int64(), "tokens", "Generated tokens, dropped groups included."),
        Column("groups_kept", pa.int32(), "groups", "Groups in the update."),
        Column("groups_dropped", pa.int32(), "groups", "Groups left out, as for uniform outcomes."),
        Column("is_shaped", pa.bool_(), "-", "The shaping method was switched on at this step.", True),
        Column("rollout_s", pa.float32(), "s", "Seconds spent sampling.", True),
        Column("reward_s", pa.float32(), "s", "Seconds spent scoring answers.", True),
        Column("update_s", pa.float32(), "s", "Seconds spent on forward, backward and optimiser.", True),
        Column("record_s", pa.float32(), "s", "Seconds spent on the trace.", True),
    ),
    ("step",),
)

EVALS = Table(
    "evals",
    "one row per held-out response",
    (
        RUN_ID,
        Column("step", pa.int32(), "steps, 0 = base policy", "Updates that the evaluated policy had received."),
        Column("benchmark", pa.string(), "-", "Name of the held-out set."),
        PROMPT_ID,
        Column("sample_index", pa.int32(), "from 0", "Index of the sample; equal indices share random numbers."),
        Column("answer", pa.string(), "-", "Extracted answer; null if there is none.", True),
        ANSWER_CLASS,
        IS_CORRECT,
        RESPONSE_LENGTH,
        Column("entropy_mean", pa.float32(), "nats per token", "Mean token entropy of the response.", True),
        Column("temperature", pa.float32(), "-", "Sampling temperature."),
    ),
    ("step", "benchmark", "prompt_id", "sample_index"),
)

INTERVENTIONS = Table(
    "interventions",
    "one row per replaced token; made by `entrace intervene`, absent otherwise",
    (
        RUN_ID,
        Column("checkpoint_step", pa.int32(), "steps", "Updates that the policy of alternative and continuations had."),
        Column("seed", pa.int32(), "-", "Seed of the choice of tokens, the alternatives and the continuations."),
        Column(
            "selection",
            pa.string(),
            "-",
            "Limits on entropy quantile, position, and tercile of the tokens to choose from.",
            True,
            since=2,
        ),
        Column("temperature", pa.float32(), "-", "Sampling temperature of the continuations.", True, since=2),
        STEP,
        PROMPT_ID,
        ROLLOUT_ID,
        Column("position", pa.int32(), "tokens, from 0", "Place of the replaced token in its response."),
        RESPONSE_LENGTH,
        Column("token_id", pa.int32(), "-", "The original token."),
        Column("category", pa.string(), "-", "Function of the original token."),
        Column("alternative_id", pa.int32(), "-", "The token put in its place."),
        Column("logprob", pa.float32(), "nats", "logprob of the original, as recorded when it was sampled."),
        Column("entropy", pa.float32(), "nats", "entropy at the original, as recorded when it was sampled."),
        Column("ppl", pa.float32(), ">= 1", "Perplexity of the response."),
        Column("ppl_tercile", pa.int32(), "1, 2, 3", "Third of the response's group by perplexity; 1 = lowest."),
        Column("is_correct", pa.bool_(), "-", "The verifier gave the response full marks."),
        Column("num_continuations", pa.int32(), "responses", "Continuations sampled from either prefix."),
        Column("accuracy_original", pa.float32(), "[0, 1]", "Correct among those from the prefix with the original."),
        Column("accuracy_alternative", pa.float32(), "[0, 1]", "Correct among those with the alternative."),
        Column("impact", pa.float32(), "[-1, 1]", "accuracy_original - accuracy_alternative."),
        Column("tokens", pa.int64(), "tokens", "Tokens generated for the row."),
    ),
    ("checkpoint_step", "seed", "step", "rollout_id", "position"),
)

TABLES: dict[str, Table] = {t.name: t for t in (TOKENS, ROLLOUTS, PROMPTS, VOCAB, STEPS, EVALS, INTERVENTIONS)}
