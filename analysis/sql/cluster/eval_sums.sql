-- question: M1, M2, M3. How did each held-out prompt fare in each run, at every evaluation?
-- grain: one row per run, benchmark, step and prompt
-- params: $runs list of run_id, null = all; $k samples per prompt, null = 8
-- units: avg_at_k in [0, 1]; response_length in tokens
-- needs: evaluations
with prompts_evaluated as (
  select *
  from eval_prompts(coalesce($k, 8)::integer)
  where $runs is null or list_contains($runs, run_id)
),
final as (
  select run_id, benchmark, step, benchmark || '/' || prompt_id as prompt_id, avg_at_k, response_length
  from prompts_evaluated
  order by all
)
select * from final
