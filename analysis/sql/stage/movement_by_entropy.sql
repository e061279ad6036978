-- question: S6. Do high-entropy tokens move most: up in positive responses, down in negative ones?
-- grain: one row per run, stage, sample sign, and decile of entropy (1 = lowest), over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: dp, low, high: mean change of probability; movement, movement_low, movement_high: mean |dp| (95% intervals
--   over steps and prompts); grad_norm in nats; entropy_mean in nats; num_* are counts
-- needs: after-update values, log-probabilities, entropies, token advantages
with moved as (
  select
    run_id,
    step,
    prompt_id,
    advantage > 0 as is_positive,
    entropy,
    floor(1000 * ln(greatest(entropy, 1e-9)))::integer as bin,
    grad_norm,
    dp
  from moved_tokens
  where
    advantage <> 0
    and entropy is not null
    and ($runs is null or list_contains($runs, run_id))
),
bins as (
  select counted.run_id, staged_steps.stage, counted.bin, sum(counted.tokens) as tokens
  from (
    select run_id, step, bin, count(*) as tokens
    from moved
    group by all
  ) as counted
  join staged_steps on staged_steps.run_id = counted.run_id and staged_steps.step = counted.step
  where $stage is null or staged_steps.stage = $stage
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
-- The lowest bin above each decile.
limits as (
  select staged_steps.step, of_stage.*
  from (
    select
      run_id,
      stage,
      min(bin) filter (where entropy_decile > 1) as first_after_1,
      min(bin) filter (where entropy_decile > 2) as first_after_2,
      min(bin) filter (where entropy_decile > 3) as first_after_3,
      min(bin) filter (where entropy_decile > 4) as first_after_4,
      min(bin) filter (where entropy_decile > 5) as first_after_5,
      min(bin) filter (where entropy_decile > 6) as first_after_6,
      min(bin) filter (where entropy_decile > 7) as first_after_7,
      min(bin) filter (where entropy_decile > 8) as first_after_8,
      min(bin) filter (where entropy_decile > 9) as first_after_9
    from deciles
    group by all
  ) as of_stage
  join staged_steps on staged_steps.run_id = of_stage.run_id and staged_steps.stage = of_stage.stage
),
summed as (
  select
    moved.run_id,
    moved.step,
    moved.prompt_id,
    moved.is_positive,
    (
      1
      + coalesce(moved.bin >= limits.first_after_1, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_2, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_3, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_4, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_5, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_6, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_7, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_8, false)::tinyint
      + coalesce(moved.bin >= limits.first_after_9, false)::tinyint
    )::integer as entropy_decile,
    sum(dp) as dp_sum,
    sum(abs(dp)) as movement_sum,
    sum(grad_norm::double) as grad_norm_sum,
    sum(entropy::double) as entropy_sum,
    count(*) as tokens
  from moved
  join limits on limits.run_id = moved.run_id and limits.step = moved.step
  group by all
),
per_prompt as (
  select summed.*, limits.stage, if(is_positive, 'positive', 'negative') as sample_sign
  from summed
  join limits on limits.run_id = summed.run_id and limits.step = summed.step
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
