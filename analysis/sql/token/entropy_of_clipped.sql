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
    step,
    prompt_id,
    advantage > 0 as is_positive,
    odds_bin(logprob::double) as odds_bin,
    is_clipped,
    sum(dentropy) as change,
    sum(dlogprob) as shift,
    count(*) as tokens
  from entropy_changes
  where advantage <> 0 and is_clipped is not null and ($runs is null or list_contains($runs, run_id))
  group by all
),
staged as (
  select
    changed.*,
    staged_steps.stage,
    if(is_positive, 'positive', 'negative') as sample_sign,
    sum(if(is_clipped, changed.tokens, 0)) over comparable as num_clipped,
    sum(if(is_clipped, 0, changed.tokens)) over comparable as num_rest
  from changed
  join staged_steps on staged_steps.run_id = changed.run_id and staged_steps.step = changed.step
  where $stage is null or staged_steps.stage = $stage
  window comparable as (partition by changed.run_id, changed.step, is_positive, odds_bin)
),
-- Clipped tokens without a comparable one are left out.
weighted as (
  select
    *,
    if(is_clipped, 'clipped', 'comparable') as kind,
    if(is_clipped, 1, num_clipped / num_rest) as weight
  from staged
  where num_clipped > 0 and num_rest > 0
),
signs as (
  select run_id, stage, sample_sign, sum(tokens) as tokens
  from staged
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
    sum(weight * change) as change_sum,
    sum(weight * shift) as shift_sum,
    sum(weight * tokens) as weight,
    sum(tokens) as tokens
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
