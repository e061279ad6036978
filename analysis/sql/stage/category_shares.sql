-- question: S3. In the rising stage, do task-irrelevant tokens become rarer and reasoning tokens more frequent?
-- grain: one row per run, step, and token category, over all sampled tokens; share is 0 for a category that does not
--   occur
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: share, low, high in [0, 1] of tokens (95% interval over prompts); num_tokens in tokens; num_prompts in
--   prompts; boundary_* in steps
-- needs: tokens, token categories
with
-- Counts are joined with stages, because joining every token would take most of the time.
counted as (
  select
    run_id,
    step,
    prompt_id,
    count(*) as tokens,
    sum((category = 'formal_reasoning')::integer) as formal_reasoning,
    sum((category = 'logical_structuring')::integer) as logical_structuring,
    sum((category = 'metacognitive')::integer) as metacognitive,
    sum((category = 'semantic_support')::integer) as semantic_support,
    sum((category = 'special')::integer) as special
  from tokens
  where $runs is null or list_contains($runs, run_id)
  group by all
),
per_prompt as (
  select counted.*, staged_steps.stage
  from counted
  join staged_steps on staged_steps.run_id = counted.run_id and staged_steps.step = counted.step
  where $stage is null or staged_steps.stage = $stage
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
    estimate_share(list(step_prompt(step, prompt_id, occurrences, tokens))) as share,
    sum(occurrences)::bigint as num_tokens,
    count(*) as num_prompts
  from per_category
  group by all
),
final as (
  select
    run_id,
    step,
    stage,
    category,
    share.value as share,
    share.low as low,
    share.high as high,
    num_tokens,
    num_prompts,
    boundary_step,
    boundary_low,
    boundary_high
  from per_step
  join stages using (run_id, stage)
  order by run_id, step, category
)
select * from final
