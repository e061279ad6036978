-- question: S5. How much of a step's movement is due to the 1, 5, and 20% of its tokens that move most?
-- grain: one row per run, stage, and top share (0.01, 0.05, 0.2), averaged over steps with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: share, low, high, even, random in [0, 1] of all |dp| (95% interval over steps and prompts); even = equal
--   movement of all tokens, random = random logit changes; num_* are counts
-- needs: after-update values, log-probabilities
with moved as (
  select run_id, step, prompt_id, abs(dp) as movement, potential_bin(exp(logprob::double))::tinyint as bin
  from moved_tokens
  where $runs is null or list_contains($runs, run_id)
),
per_step as (
  select by_step.*, staged_steps.stage
  from (
    select
      run_id,
      step,
      quantile_cont(movement, [0.99, 0.95, 0.8]) as thresholds,
      sum(movement) as step_movement
    from moved
    group by all
    having sum(movement) > 0
  ) as by_step
  join staged_steps on staged_steps.run_id = by_step.run_id and staged_steps.step = by_step.step
  where $stage is null or staged_steps.stage = $stage
),
-- Shares under random logit changes of equal size at the recorded probabilities;
-- see analysis/statistics/random_movement.py.
bins as (
  select counted.*, per_step.stage
  from (
    select run_id, step, bin, count(*) as tokens
    from moved
    group by all
  ) as counted
  join per_step on per_step.run_id = counted.run_id and per_step.step = counted.step
),
tops as (
  select listed.place, listed.top::double as top
  from (values (1, 0.01), (2, 0.05), (3, 0.2)) as listed (place, top)
),
random_shares as (
  select run_id, stage, top, avg(random_share order by step) as random
  from (
    select
      run_id,
      stage,
      step,
      top,
      random_top_share(list({'bin': bin, 'tokens': tokens} order by bin), top) as random_share
    from bins, tops
    group by run_id, stage, step, top
  )
  group by all
),
sums as (
  select
    moved.run_id,
    moved.step,
    moved.prompt_id,
    count(*) as tokens,
    sum(movement) as movement,
    [
      sum(greatest(movement - thresholds[1], 0)),
      sum(greatest(movement - thresholds[2], 0)),
      sum(greatest(movement - thresholds[3], 0))
    ] as above
  from moved
  join per_step on per_step.run_id = moved.run_id and per_step.step = moved.step
  group by moved.run_id, moved.step, moved.prompt_id
),
-- top_share adds up to the share of movement of exactly the top share of tokens; ties at the threshold are split.
per_prompt as (
  select
    run_id,
    stage,
    top,
    step,
    prompt_id,
    (above[place] + tokens * top * thresholds[place]) / step_movement as top_share,
    movement / step_movement as share_of_step,
    tokens
  from sums
  join per_step using (run_id, step)
  cross join tops
),
per_top as (
  select
    run_id,
    stage,
    top,
    estimate_share(list(step_prompt(step, prompt_id, top_share, share_of_step))) as share,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    top,
    share.value as share,
    share.low as low,
    share.high as high,
    top as even,
    random,
    num_tokens,
    num_prompts
  from per_top
  join random_shares using (run_id, stage, top)
  order by run_id, stage desc, top
)
select * from final
