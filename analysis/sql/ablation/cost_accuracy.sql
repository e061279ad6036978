-- question: M1, M2. What did each run cost in generated tokens and seconds, and which accuracy did it reach?
-- grain: one row per run and benchmark, at the last evaluation of the run
-- params: $runs: list of run_id (default all); $k: integer in [1, 1000000], samples per prompt (default 8)
-- units: avg_at_k, low, high in [0, 1] (95% interval over prompts); tokens, seconds: totals of all training steps up
--   to the evaluation; k in samples per prompt; num_prompts in prompts
-- needs: evaluations
with accuracies as (
  select
    run_id,
    benchmark,
    step,
    estimate_share(list(step_prompt(step, prompt_id, avg_at_k, 1))) as accuracy,
    min(num_samples) as k,
    count(*) as num_prompts
  from last_eval_means(coalesce($k, 8)::integer)
  where $runs is null or list_contains($runs, run_id)
  group by all
),
costs as (
  select
    accuracies.run_id,
    accuracies.benchmark,
    sum(steps.tokens)::bigint as tokens,
    -- A step without timings makes the cost of the run unknown.
    if(
      count(rollout_s + reward_s + update_s + record_s) = count(*),
      sum(rollout_s::double + reward_s + update_s + record_s),
      null
    ) as seconds
  from accuracies
  join steps on steps.run_id = accuracies.run_id and steps.step <= accuracies.step
  group by all
),
final as (
  select
    runs.arm,
    runs.seed,
    accuracies.run_id,
    accuracies.benchmark,
    accuracies.step,
    accuracies.accuracy.value as avg_at_k,
    accuracies.accuracy.low as low,
    accuracies.accuracy.high as high,
    accuracies.k,
    accuracies.num_prompts,
    costs.tokens,
    costs.seconds
  from accuracies
  join costs using (run_id, benchmark)
  left join runs on runs.run_id = accuracies.run_id
  order by arm, seed, accuracies.run_id, benchmark
)
select * from final
