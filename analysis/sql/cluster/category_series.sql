-- question: S3. How do the shares of reasoning tokens and of other words develop from step to step?
-- grain: one row per run and step, over all sampled tokens; reasoning = formal, logical and metacognitive
-- params: $runs list of run_id, null = all
-- units: *_share in [0, 1] of tokens
-- needs: tokens
with per_category as (
  select run_id, step, category, count(*) as tokens
  from tokens
  where $runs is null or list_contains($runs, run_id)
  group by all
),
final as (
  select
    run_id,
    step,
    coalesce(sum(tokens) filter (where is_reasoning(category)), 0) / sum(tokens) as reasoning_share,
    coalesce(sum(tokens) filter (where category = 'semantic_support'), 0) / sum(tokens) as semantic_share
  from per_category
  group by all
  order by run_id, step
)
select * from final
