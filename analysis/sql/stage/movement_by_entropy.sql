-- question: S6. Do high-entropy tokens move most: up in positive responses, down in negative ones?
-- grain: one row per run, stage, sample sign, and decile of entropy (1 = lowest), over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: dp, low, high: mean change of probability; movement, movement_low, movement_high: mean |dp| (95% intervals
--   over steps and prompts); grad_norm in nats; entropy_mean in nats; num_* are counts
-- needs: after-update values, log-probabilities, entropies, token advantages
with moved as (
  select
    run_id,
    stage,
    sample_sign,
    step,
    prompt_id,
    entropy,
    floor(1000 * ln(greatest(entropy, 1e-9)))::integer as bin,
    grad_norm,
    dp
  from staged_movements
  where
    sample_sign is not null
    and entropy is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
bins as (
  select run_id, stage, bin, count(*) as tokens
  from moved
  group by all
),
-- Deciles per run and stage, over both signs. A bin is 0.1% wide and belongs to the decile of its lowest token. Ties,
-- such as many entropies near 0, can therefore make deciles unequal or empty.
deciles as (
  select
    run_id,
    stage,
    bin,
    1 + floor(
      10 * (sum(tokens) over (partition by run_id, stage order by bin) - tokens)
      / sum(tokens) over (partition by run_id, stage)
    )::integer as entropy_decile
  from bins
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    entropy_decile,
    step,
    prompt_id,
    sum(dp) as dp_sum,
    sum(abs(dp)) as movement_sum,
    sum(grad_norm::double) as grad_norm_sum,
    sum(entropy::double) as entropy_sum,
    count(*) as tokens
  from moved
  join deciles using (run_id, stage, bin)
  group by all
),
per_decile as (
  select
    run_id,
    stage,
    sample_sign,
    entropy_decile,
    estimate(list(step_prompt(step, prompt_id, dp_sum, tokens))) as dp,
    estimate_positive(list(step_prompt(step, prompt_id, movement_sum, tokens))) as movement,
    sum(grad_norm_sum) / sum(tokens) as grad_norm,
    sum(entropy_sum) / sum(tokens) as entropy_mean,
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
    entropy_decile,
    dp.value as dp,
    dp.low as low,
    dp.high as high,
    movement.value as movement,
    movement.low as movement_low,
    movement.high as movement_high,
    grad_norm,
    entropy_mean,
    num_tokens,
    num_prompts
  from per_decile
  order by run_id, stage desc, sample_sign, entropy_decile
)
select * from final
