-- question: M1, M2, M3. How much does each arm differ from its baseline, seed by seed, on the same held-out prompts?
-- grain: one row per arm, benchmark, metric, and seed for which both the arm and its baseline have a complete run
-- params: $runs: list of run_id (default all); $baselines: map of arm to arm, the baseline of each (default none for
--   every arm); $k: integer in [1, 1000000], samples per prompt (default 8)
-- units: value, baseline_value: *_at_k in [0, 1], response_length in tokens, entropy in nats per token, all at the last
--   common evaluation; difference = value - baseline_value, relative for response_length; num_prompts in prompts
-- needs: evaluations
with complete as (
  select
    run_id,
    arm,
    seed,
    coalesce(map_extract_value($baselines::map (varchar, varchar), arm), 'none') as baseline
  from runs
  where status = 'complete' and ($runs is null or list_contains($runs, run_id))
  qualify row_number() over (partition by arm, seed order by run_id) = 1
),
pairs as (
  select shaped.arm, shaped.baseline, shaped.seed, shaped.run_id, plain.run_id as baseline_run_id
  from complete as shaped
  join complete as plain on plain.arm = shaped.baseline and plain.seed = shaped.seed
  where shaped.arm <> shaped.baseline
),
prompts_evaluated as materialized (
  select *
  from eval_prompts(coalesce($k, 8)::integer)
  where $runs is null or list_contains($runs, run_id)
),
at_last_common_step as (
  select
    pairs.arm,
    pairs.baseline,
    pairs.seed,
    shaped.benchmark,
    shaped.step,
    [
      {'metric': 'avg_at_k', 'measure': shaped.avg_at_k, 'baseline_measure': plain.avg_at_k},
      {'metric': 'maj_at_k', 'measure': shaped.maj_at_k, 'baseline_measure': plain.maj_at_k},
      {'metric': 'pass_at_k', 'measure': shaped.pass_at_k, 'baseline_measure': plain.pass_at_k},
      {
        'metric': 'response_length',
        'measure': shaped.response_length,
        'baseline_measure': plain.response_length
      },
      {'metric': 'entropy', 'measure': shaped.entropy, 'baseline_measure': plain.entropy}
    ] as measures
  from pairs
  join prompts_evaluated as shaped on shaped.run_id = pairs.run_id
  join prompts_evaluated as plain
    on plain.run_id = pairs.baseline_run_id
    and plain.benchmark = shaped.benchmark
    and plain.step = shaped.step
    and plain.prompt_id = shaped.prompt_id
  qualify shaped.step = max(shaped.step) over (partition by pairs.arm, pairs.seed, shaped.benchmark)
),
per_metric as (
  select arm, baseline, seed, benchmark, step, unnest(measures) as measured
  from at_last_common_step
),
paired as (
  select
    arm,
    baseline,
    seed,
    benchmark,
    step,
    measured.metric,
    measured.measure,
    measured.baseline_measure
  from per_metric
  where measured.measure is not null and measured.baseline_measure is not null
),
final as (
  select
    arm,
    baseline,
    benchmark,
    metric,
    seed,
    step,
    avg(measure) as value,
    avg(baseline_measure) as baseline_value,
    if(
      any_value(metric) = 'response_length',
      avg(measure) / avg(baseline_measure) - 1,
      avg(measure - baseline_measure)
    ) as difference,
    count(*) as num_prompts
  from paired
  group by all
  order by arm, benchmark, metric, seed
)
select * from final
