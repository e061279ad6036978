-- question: What does an update do to the entropy of tokens that the ratio clip removed from it?
-- grain: one row per run, stage, sample sign, and kind of token (clipped, or comparable: not clipped, of equal step,
--   sign of the advantage, and probability), over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: change, low, high in nats per token (95% interval over steps and prompts); shift in nats: mean change of
--   log-probability; share in [0, 1] of the sign's tokens; num_* are counts; comparable tokens have the weight of the
--   clipped tokens that they stand for
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages, clipped tokens
with changed as (
  select
    run_id,
    stage,
    sample_sign,
    step,
    prompt_id,
    is_clipped,
    odds_bin(logprob::double) as odds_bin,
    dentropy,
    dlogprob
  from staged_entropy_changes
  where
    sample_sign is not null
    and is_clipped is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
cells as (
  select
    run_id,
    step,
    sample_sign,
    odds_bin,
    count(*) filter (where is_clipped) as num_clipped,
    count(*) filter (where not is_clipped) as num_rest
  from changed
  group by all
),
-- Clipped tokens without a comparable one are left out.
weighted as (
  select
    changed.*,
    if(is_clipped, 'clipped', 'comparable') as kind,
    if(is_clipped, 1, num_clipped / num_rest) as weight
  from changed
  join cells using (run_id, step, sample_sign, odds_bin)
  where num_clipped > 0 and num_rest > 0
),
signs as (
  select run_id, stage, sample_sign, count(*) as tokens
  from changed
  group by all
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    kind,
    step,
    prompt_id,
    sum(weight * dentropy) as change_sum,
    sum(weight * dlogprob) as shift_sum,
    sum(weight) as weight,
    count(*) as tokens
  from weighted
  group by all
),
per_kind as (
  select
    run_id,
    stage,
    sample_sign,
    kind,
    estimate(list(step_prompt(step, prompt_id, change_sum, weight))) as change,
    sum(shift_sum) / sum(weight) as shift,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    kind,
    change.value as change,
    change.low as low,
    change.high as high,
    shift,
    num_tokens / signs.tokens as share,
    num_tokens,
    num_prompts
  from per_kind
  join signs using (run_id, stage, sample_sign)
  order by run_id, stage desc, sample_sign, kind
)
select * from final
