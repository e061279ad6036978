-- question: M1, M2, M3. How much does each arm differ from its baseline, seed by seed, on the same held-out prompts?
-- grain: one row per arm, benchmark, metric, and seed for which both the arm and its baseline have a complete run
-- params: $runs: list of run_id (default all); $baselines: map of arm to arm, the baseline of each (default none for
--   every arm); $k: integer in [1, 1000000], samples per prompt (default 8)
-- units: value, baseline_value: *_at_k in [0, 1], response_length in tokens, entropy in nats per token, all at the last
--   common evaluation; difference = value - baseline_value, relative for response_length; num_prompts in prompts,
--   which are equal if their texts are, or their ids without a text
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
  select of_arm.arm, of_arm.baseline, of_arm.seed, of_arm.run_id, of_baseline.run_id as baseline_run_id
  from complete as of_arm
  join complete as of_baseline on of_baseline.arm = of_arm.baseline and of_baseline.seed = of_arm.seed
  where of_arm.arm <> of_arm.baseline
),
prompts_evaluated as materialized (
  select *
  from eval_prompts(coalesce($k, 8)::integer)
  where $runs is null or list_contains($runs, run_id)
),
texts as (
  select run_id, prompt_id, any_value(prompt) as prompt
  from prompts
  where $runs is null or list_contains($runs, run_id)
  group by all
),
-- Equal ids may name different prompts in different runs.
by_text as materialized (
  select
    run_id,
    benchmark,
    step,
    coalesce(prompt, prompt_id) as prompt,
    avg(avg_at_k) as avg_at_k,
    avg(maj_at_k) as maj_at_k,
    avg(pass_at_k) as pass_at_k,
    avg(response_length) as response_length,
    avg(entropy) as entropy
  from prompts_evaluated
  left join texts using (run_id, prompt_id)
  group by all
),
at_last_common_step as (
  select
    pairs.arm,
    pairs.baseline,
    pairs.seed,
    of_arm.benchmark,
    of_arm.step,
    [
      {'metric': 'avg_at_k', 'measure': of_arm.avg_at_k, 'baseline_measure': of_baseline.avg_at_k},
      {'metric': 'maj_at_k', 'measure': of_arm.maj_at_k, 'baseline_measure': of_baseline.maj_at_k},
      {'metric': 'pass_at_k', 'measure': of_arm.pass_at_k, 'baseline_measure': of_baseline.pass_at_k},
      {
        'metric': 'response_length',
        'measure': of_arm.response_length,
        'baseline_measure': of_baseline.response_length
      },
      {'metric': 'entropy', 'measure': of_arm.entropy, 'baseline_measure': of_baseline.entropy}
    ] as measures
  from pairs
  join by_text as of_arm on of_arm.run_id = pairs.run_id
  join by_text as of_baseline
    on of_baseline.run_id = pairs.baseline_run_id
    and of_baseline.benchmark = of_arm.benchmark
    and of_baseline.step = of_arm.step
    and of_baseline.prompt = of_arm.prompt
  qualify of_arm.step = max(of_arm.step) over (partition by pairs.arm, pairs.seed, of_arm.benchmark)
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
