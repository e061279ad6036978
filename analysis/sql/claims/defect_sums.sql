-- question: S4. How many responses to each prompt are defective, step by step?
-- grain: one row per run, step, and prompt, over all sampled responses
-- params: $runs: list of run_id (default all)
-- units: defective, responses in responses
-- needs: responses
with final as (
  select
    run_id,
    step,
    prompt_id,
    count(*) filter (where len(defects) > 0) as defective,
    count(*) as responses
  from staged_responses
  where $runs is null or list_contains($runs, run_id)
  group by all
  order by all
)
select * from final
