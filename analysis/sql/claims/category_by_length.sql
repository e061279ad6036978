-- question: S3. Which functions do the tokens of responses of each length have, step by step?
-- grain: one row per run, step, and response length, over all sampled tokens
-- params: $runs: list of run_id (default all)
-- units: response_length, tokens, reasoning, semantic in tokens; reasoning = formal_reasoning, logical_structuring, and
--   metacognitive
-- needs: tokens, token categories
with final as (
  select
    run_id,
    step,
    response_length,
    count(*) as tokens,
    count(*) filter (where is_reasoning(category)) as reasoning,
    count(*) filter (where category = 'semantic_support') as semantic
  from tokens
  where $runs is null or list_contains($runs, run_id)
  group by all
  order by all
)
select * from final
