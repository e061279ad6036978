"""State why columns of an imported trace are null."""

from __future__ import annotations

from entrace.analysis.importers.collect import Counts

STEPS_OF_UPDATE = ("loss", "kl", "clip_frac_low", "clip_frac_high", "clip_frac_dual", "grad_norm", "lr")
NO_UPDATE = "the rows hold what was sampled, not what an update did"
UNKNOWN = {
    "rollouts.length_penalty": "the rows give one reward, without the part deducted for length",
    "rollouts.drop_reason": NO_UPDATE,
    "rollouts.policy_step": "the rows do not say how many updates the sampling policy had received",
    "rollouts.answer_class": "the rows do not say which answers count as equal",
    "interventions": "an imported trace has no checkpoint to continue from",
    "evals": "the rows hold no held-out evaluation",
    **{f"tokens.{name}": NO_UPDATE for name in ("logprob_after", "entropy_after", "is_clipped")},
    "tokens.reference_entropy": "the rows do not hold entropies of the reference policy; add --model and --reference",
    **dict.fromkeys(("tokens.sum_p2_others", "tokens.sum_p2_logp_others"), "only `entrace train` records the sums"),
    **{f"steps.{name}": NO_UPDATE for name in STEPS_OF_UPDATE},
    "steps.is_shaped": NO_UPDATE,
    **{f"steps.{name}": "not timed" for name in ("rollout_s", "reward_s", "update_s", "record_s")},
}
# Columns that depend on optional fields; they are null for the rows without the field.
FROM_FIELDS = {
    "answer": ("has_answer", ("rollouts.answer", "rollouts.has_answer", "steps.format_rate")),
    "is_truncated": ("is_truncated", ("rollouts.is_truncated",)),
    "ground_truth": ("ground_truth", ("prompts.ground_truth",)),
    "reward": ("reward", ("rollouts.reward", "steps.reward_mean")),
    "is_correct": ("is_correct", ("rollouts.is_correct", "tokens.is_correct", "steps.accuracy")),
    "reward_components": ("reward_components", ("rollouts.reward_components",)),
    "sampling_logprob": ("sampling_logprob", ("tokens.sampling_logprob",)),
    "reference_logprob": ("reference_logprob", ("tokens.reference_logprob",)),
    "turn": ("turn", ("tokens.turn",)),
    "policy_version": ("policy_version", ("tokens.policy_version",)),
}
MEASURED = {
    "logprob": ("tokens.logprob", "rollouts.logprob_kind", "rollouts.surprisal_mean", "rollouts.ppl", "rollouts.ppl_z"),
    "entropy": ("tokens.entropy", "rollouts.entropy_kind", "steps.entropy_token_mean"),
}
NO_MODEL = "add --model"
IMPORTED = "entropy is that of the importing model, not of the policies that sampled"
NO_TEXTS = "token texts are unknown; import with --tokenizer or --model"


def unknown_columns(counts: Counts, *, has_model: bool, has_texts: bool, has_reference: bool = False) -> dict[str, str]:
    """Return the reason why a column is null, by table and column."""
    reasons = dict(UNKNOWN)
    for field, (column, columns) in FROM_FIELDS.items():
        reasons |= _missing(field, counts.known[column], counts.rollouts, columns)
    if has_reference:
        for column in ("tokens.reference_logprob", "tokens.reference_entropy"):
            reasons.pop(column, None)
    if not has_model:
        for field, columns in MEASURED.items():
            found = _missing(field, counts.known[field], counts.rollouts, columns)
            reasons |= {name: f"{reason}; {NO_MODEL}" for name, reason in found.items()}
        if missing := counts.rollouts - max(counts.known["entropy"], counts.known["entropy_mean"]):
            reasons["rollouts.entropy_mean"] = f'{_rows(missing, counts.rollouts)} no "entropy"; {NO_MODEL}'
        reasons["tokens.grad_norm"] = f"the norm needs the probabilities of all tokens; {NO_MODEL}"
        if counts.known["temperature"] < counts.rollouts:
            reasons["rollouts.temperature"] = "the rows do not say it; add --temperature"
    elif counts.known["entropy"] < counts.rollouts:
        reasons["policy.entropy"] = IMPORTED
    if not counts.masked:
        reasons["tokens.loss_mask"] = reasons["rollouts.generated_length"] = "the policy generated all tokens"
    if not counts.with_advantage and not counts.known["reward"]:
        names = ("rollouts.advantage", "tokens.advantage", "tokens.shaped_advantage")
        reasons |= dict.fromkeys(names, "the rows have neither advantages nor rewards; add --rewards FILE")
        if not counts.known["is_kept"]:
            why = "the rows do not say which responses entered the update; all count as kept"
            reasons |= dict.fromkeys(("tokens.is_kept", "steps.groups_kept", "steps.groups_dropped"), why)
    if not has_texts and counts.with_text < counts.rollouts:
        reasons |= dict.fromkeys(("vocab.text", "tokens.category", "rollouts.defects"), NO_TEXTS)
    if not has_texts:
        reasons["vocab.is_special"] = "the dump does not mark special tokens; add --tokenizer PATH"
    return reasons


def _missing(field: str, known: int, total: int, columns: tuple[str, ...]) -> dict[str, str]:
    missing = total - known
    return dict.fromkeys(columns, f'{_rows(missing, total)} no "{field}"') if missing else {}


def _rows(missing: int, total: int) -> str:
    return "the rows have" if missing == total else f"{missing} of {total} rows have"
