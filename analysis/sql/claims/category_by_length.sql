-- question: S3. Which functions do the tokens of responses of each length serve, step by step?
-- grain: one row per run, step and response length, over all sampled tokens; reasoning = formal, logical, metacognitive
-- params: $runs list of run_id, null = all
-- units: tokens, reasoning, semantic in tokens; response_length in tokens
-- needs: tokens
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
