-- question: S6. Which kinds of tokens does an update move: up in positive responses, down in negative ones?
-- grain: one row per run, stage, sample sign, and token category, over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: dp, low, high: mean change of probability; movement, movement_low, movement_high: mean |dp| (95% intervals
--   over steps and prompts); grad_norm in nats; num_* are counts
-- needs: after-update values, log-probabilities, token advantages, token categories
with moved as (
  select
    run_id,
    step,
    prompt_id,
    advantage > 0 as is_positive,
    category,
    sum(dp) as dp_sum,
    sum(abs(dp)) as movement_sum,
    sum(grad_norm::double) as grad_norm_sum,
    count(*) as tokens
  from moved_tokens
  where advantage <> 0 and ($runs is null or list_contains($runs, run_id))
  group by all
),
per_prompt as (
  select moved.*, staged_steps.stage, if(is_positive, 'positive', 'negative') as sample_sign
  from moved
  join staged_steps on staged_steps.run_id = moved.run_id and staged_steps.step = moved.step
  where $stage is null or staged_steps.stage = $stage
),
per_category as (
  select
    run_id,
    stage,
    sample_sign,
    category,
    estimate(list(step_prompt(step, prompt_id, dp_sum, tokens))) as dp,
    estimate_positive(list(step_prompt(step, prompt_id, movement_sum, tokens))) as movement,
    sum(grad_norm_sum) / sum(tokens) as grad_norm,
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
    category,
    dp.value as dp,
    dp.low as low,
    dp.high as high,
    movement.value as movement,
    movement.low as movement_low,
    movement.high as movement_high,
    grad_norm,
    num_tokens,
    num_prompts
  from per_category
  order by run_id, stage desc, sample_sign, category
)
select * from final
