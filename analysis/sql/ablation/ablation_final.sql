-- question: M1, M2, M3. What are avg@k, maj@k, pass@k, response length, and entropy of each arm at its last evaluation?
-- grain: one row per run, benchmark, and metric; a run without evaluations has one row with nulls
-- params: $runs: list of run_id (default all); $k: integer in [1, 1000000], samples per prompt (default 8)
-- units: value, low, high: *_at_k in [0, 1], response_length in tokens, entropy in nats per token (95% interval over
--   prompts); k in samples per prompt; num_prompts in prompts
-- needs: evaluations
with measured as (
  unpivot (
    select run_id, benchmark, step, prompt_id, num_samples, avg_at_k, maj_at_k, pass_at_k, response_length, entropy
    from last_eval_prompts(coalesce($k, 8)::integer)
  )
  on avg_at_k, maj_at_k, pass_at_k, response_length, entropy
  into name metric value measure
),
per_metric as (
  select
    run_id,
    benchmark,
    step,
    metric,
    list(step_prompt(step, prompt_id, measure, 1)) as measures,
    min(num_samples) as k,
    count(*) as num_prompts
  from measured
  group by all
),
estimated as (
  select
    *,
    if(metric like '%_at_k', estimate_share(measures), estimate_positive(measures)) as mean
  from per_metric
),
final as (
  select
    runs.arm,
    runs.seed,
    runs.run_id,
    runs.status,
    runs.error,
    estimated.benchmark,
    estimated.step,
    estimated.metric,
    estimated.mean.value as value,
    estimated.mean.low as low,
    estimated.mean.high as high,
    estimated.k,
    estimated.num_prompts
  from runs
  left join estimated on estimated.run_id = runs.run_id
  where $runs is null or list_contains($runs, runs.run_id)
  order by arm, seed, runs.run_id, benchmark, metric
)
select * from final
