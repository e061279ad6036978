-- question: S2. Do incorrect (negative) responses have higher entropy than correct (positive) responses to the same
--   prompt?
-- grain: one row per run and step, over groups with both signs; every response has equal weight, whatever its length
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: gap, low, high in nats per token, gap = negative - positive (95% interval over prompts); num_prompts in
--   prompts; boundary_* in steps
-- needs: responses, response entropies, advantages
with responses as (
  select run_id, step, stage, prompt_id, group_id, sample_sign, entropy_mean::double as entropy
  from staged_responses
  where
    sample_sign is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
per_group as (
  select
    run_id,
    step,
    stage,
    prompt_id,
    group_id,
    avg(entropy) filter (where sample_sign = 'negative') - avg(entropy) filter (where sample_sign = 'positive') as gap
  from responses
  group by all
),
per_prompt as (
  select run_id, step, stage, prompt_id, sum(gap) as gap_sum, count(*) as num_groups
  from per_group
  where gap is not null
  group by all
),
per_step as (
  select
    run_id,
    step,
    stage,
    estimate(list(step_prompt(step, prompt_id, gap_sum, num_groups))) as gap,
    count(*) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    step,
    stage,
    gap.value as gap,
    gap.low as low,
    gap.high as high,
    num_prompts,
    boundary_step,
    boundary_low,
    boundary_high
  from per_step
  join stages using (run_id, stage)
  order by run_id, step
)
select * from final
