-- question: M1, M2, M3. What is the outcome of each held-out prompt in each run, at every evaluation of a benchmark?
-- grain: one row per run, step, and prompt
-- params: $runs: list of run_id (default all); $benchmark: one benchmark (default all); $k: integer in [1, 1000000],
--   samples per prompt (default 8)
-- units: num_samples, num_correct in samples; avg_at_k, maj_at_k in [0, 1]; response_length in tokens; entropy in nats
--   per token
-- needs: evaluations
with prompts_evaluated as (
  select *
  from eval_prompts(coalesce($k, 8)::integer)
  where ($runs is null or list_contains($runs, run_id)) and ($benchmark is null or benchmark = $benchmark)
),
final as (
  select
    run_id,
    step,
    prompt_id,
    num_samples,
    num_correct::integer as num_correct,
    avg_at_k,
    maj_at_k,
    response_length,
    entropy
  from prompts_evaluated
  order by all
)
select * from final
