-- question: T1. Is entropy higher at the beginning and at the end of a response than in the middle?
-- grain: one row per run, stage, sample sign, and bin of relative position (0 = first), over responses in the update
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $bins: integer in [1, 1000],
--   bins of position (default 10)
-- units: position_mid in [0, 1]; entropy, low, high in nats per token (95% interval over steps and prompts); num_* are
--   counts
-- needs: tokens, entropies, token advantages
with steps_of_stage as (
  select run_id, step, stage, token_weight
  from token_steps
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
-- Sums are joined with stages, because joining every token would take most of the time.
per_prompt as (
  select
    run_id,
    step,
    prompt_id,
    advantage > 0 as is_positive,
    bin_of_position(position, response_length, coalesce($bins, 10)) as position_bin,
    sum(entropy) as entropy_sum,
    count(*) as tokens
  from tokens
  where
    is_kept
    and advantage <> 0
    and entropy is not null
    and ($runs is null or list_contains($runs, run_id))
  group by all
),
per_bin as (
  select
    run_id,
    stage,
    is_positive,
    position_bin,
    estimate_positive(list(step_prompt(step, prompt_id, entropy_sum * token_weight, tokens * token_weight))) as entropy,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  join steps_of_stage using (run_id, step)
  group by all
),
final as (
  select
    run_id,
    stage,
    if(is_positive, 'positive', 'negative') as sample_sign,
    position_bin,
    (position_bin + 0.5) / coalesce($bins, 10)::integer as position_mid,
    entropy.value as entropy,
    entropy.low as low,
    entropy.high as high,
    num_tokens,
    num_prompts
  from per_bin
  order by run_id, stage desc, sample_sign, position_bin
)
select * from final
