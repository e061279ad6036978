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
measured as (
  unpivot (
    select run_id, benchmark, step, prompt_id, avg_at_k, maj_at_k, pass_at_k, response_length, entropy
    from eval_prompts(coalesce($k, 8)::integer)
  )
  on avg_at_k, maj_at_k, pass_at_k, response_length, entropy
  into name metric value measure
),
paired as (
  select
    pairs.arm,
    pairs.baseline,
    pairs.seed,
    shaped.benchmark,
    shaped.step,
    shaped.metric,
    shaped.measure,
    plain.measure as baseline_measure
  from pairs
  join measured as shaped on shaped.run_id = pairs.run_id
  join measured as plain
    on plain.run_id = pairs.baseline_run_id
    and plain.benchmark = shaped.benchmark
    and plain.step = shaped.step
    and plain.metric = shaped.metric
    and plain.prompt_id = shaped.prompt_id
  qualify shaped.step = max(shaped.step) over (partition by pairs.arm, pairs.seed, shaped.benchmark)
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
