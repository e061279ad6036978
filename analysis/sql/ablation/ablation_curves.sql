-- question: M1, M2, M3. How does the held-out performance of each arm develop during training?
-- grain: one row per run, benchmark, and evaluated step
-- params: $runs: list of run_id (default all); $k: integer in [1, 1000000], samples per prompt (default 8)
-- units: avg_at_k, low, high in [0, 1] (95% interval over prompts); response_length in tokens; entropy in nats per
--   token; k in samples per prompt; num_prompts in prompts
-- needs: evaluations
with prompts_evaluated as (
  select *
  from eval_means(coalesce($k, 8)::integer)
  where $runs is null or list_contains($runs, run_id)
),
per_step as (
  select
    run_id,
    benchmark,
    step,
    estimate_share(list(step_prompt(step, prompt_id, avg_at_k, 1))) as accuracy,
    avg(response_length) as response_length,
    avg(entropy) as entropy,
    min(num_samples) as k,
    count(*) as num_prompts
  from prompts_evaluated
  group by all
),
final as (
  select
    runs.arm,
    runs.seed,
    per_step.run_id,
    per_step.benchmark,
    per_step.step,
    per_step.accuracy.value as avg_at_k,
    per_step.accuracy.low as low,
    per_step.accuracy.high as high,
    per_step.response_length,
    per_step.entropy,
    per_step.k,
    per_step.num_prompts
  from per_step
  left join runs on runs.run_id = per_step.run_id
  order by arm, seed, per_step.run_id, benchmark, step
)
select * from final
