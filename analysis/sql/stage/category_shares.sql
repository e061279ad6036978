-- question: S3. Do task-irrelevant tokens become rarer, and reasoning tokens more frequent, in the rising stage?
-- grain: one row per run, step and token category, over all sampled tokens; share 0 where a category does not occur
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both
-- units: share, low, high in [0, 1] of tokens (95 % interval, clustered by prompt); num_tokens in tokens
-- needs: tokens
with steps_of_stage as (
  select run_id, step, stage
  from staged_steps
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
-- Tokens are counted before they meet their stage: joining each of them would take most of the time.
counted as (
  select run_id, step, prompt_id, category, count(*) as occurrences
  from tokens
  where $runs is null or list_contains($runs, run_id)
  group by all
),
per_prompt as (
  select
    run_id,
    step,
    stage,
    prompt_id,
    sum(occurrences) as tokens,
    coalesce(sum(occurrences) filter (where category = 'formal_reasoning'), 0) as formal_reasoning,
    coalesce(sum(occurrences) filter (where category = 'logical_structuring'), 0) as logical_structuring,
    coalesce(sum(occurrences) filter (where category = 'metacognitive'), 0) as metacognitive,
    coalesce(sum(occurrences) filter (where category = 'semantic_support'), 0) as semantic_support,
    coalesce(sum(occurrences) filter (where category = 'special'), 0) as special
  from counted
  join steps_of_stage using (run_id, step)
  group by all
),
per_category as (
  select *
  from per_prompt unpivot (
    occurrences for category in (formal_reasoning, logical_structuring, metacognitive, semantic_support, special)
  )
),
per_step as (
  select
    run_id,
    step,
    stage,
    category,
    clustered_mean(occurrences, tokens) as share,
    as_share(clustered_low(occurrences, tokens)) as low,
    as_share(clustered_high(occurrences, tokens)) as high,
    sum(occurrences)::bigint as num_tokens,
    count(*) as num_prompts
  from per_category
  group by all
),
final as (
  select per_step.*, boundary_step, boundary_low, boundary_high
  from per_step
  join stages using (run_id, stage)
  order by run_id, step, category
)
select * from final
