-- question: M1, M2, M3. Where does each arm end: avg@k, maj@k, pass@k, response length and entropy at the last evaluation?
-- grain: one row per run, benchmark and metric; a run without evaluations keeps one row with nulls
-- params: $runs list of run_id, null = all; $k samples per prompt, null = 8
-- units: *_at_k in [0, 1]; response_length in tokens; entropy in nats per token; low, high 95 % interval over prompts
-- needs: evaluations
with measured as (
  unpivot (
    select run_id, benchmark, step, num_samples, avg_at_k, maj_at_k, pass_at_k, response_length, entropy
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
    clustered_mean(measure, 1) as value,
    clustered_low(measure, 1) as low,
    clustered_high(measure, 1) as high,
    min(num_samples) as k,
    count(*) as num_prompts
  from measured
  group by all
),
final as (
  select
    runs.arm,
    runs.seed,
    runs.run_id,
    runs.status,
    runs.error,
    per_metric.benchmark,
    per_metric.step,
    per_metric.metric,
    per_metric.value,
    if(metric like '%_at_k', as_share(low), low) as low,
    if(metric like '%_at_k', as_share(high), high) as high,
    per_metric.k,
    per_metric.num_prompts
  from runs
  left join per_metric on per_metric.run_id = runs.run_id
  where $runs is null or list_contains($runs, runs.run_id)
  order by arm, seed, runs.run_id, benchmark, metric
)
select * from final
