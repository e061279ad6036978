-- question: M1, M2. On which share of held-out prompts is each arm correct in more than a share tau of its samples?
-- grain: one row per run, benchmark, and tau, at the last evaluation of the run
-- params: $runs: list of run_id (default all); $k: integer in [1, 1000000], samples per prompt (default 8)
-- units: tau in [0, 1]; share, low, high in [0, 1] of prompts with more than tau of k samples correct (95% interval
--   over prompts); num_prompts in prompts
-- needs: evaluations
with prompts_evaluated as (
  select *
  from last_eval_means(coalesce($k, 8)::integer)
  where $runs is null or list_contains($runs, run_id)
),
sample_counts as (
  select run_id, benchmark, step, min(num_samples) as k, count(*) as num_prompts
  from prompts_evaluated
  group by all
),
-- The share is constant between neighboring thresholds.
thresholds as (
  select *, unnest(range(k)) as num_below
  from sample_counts
),
exceeding as (
  select
    run_id,
    benchmark,
    num_below / k as tau,
    estimate_share(list(step_prompt(step, prompt_id, is_above, 1))) as share
  from (
    select *, (num_correct * k > num_below * num_samples)::integer as is_above
    from thresholds
    join prompts_evaluated using (run_id, benchmark, step)
  )
  group by all
),
final as (
  select
    runs.arm,
    runs.seed,
    exceeding.run_id,
    exceeding.benchmark,
    exceeding.tau,
    exceeding.share.value as share,
    exceeding.share.low as low,
    exceeding.share.high as high,
    sample_counts.step,
    sample_counts.k,
    sample_counts.num_prompts
  from exceeding
  join sample_counts using (run_id, benchmark)
  left join runs on runs.run_id = exceeding.run_id
  order by arm, seed, exceeding.run_id, benchmark, tau
)
select * from final
