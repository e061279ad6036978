-- question: S4. Do defective responses become rarer in the rising stage?
-- grain: one row per run, step, and defect, over all sampled responses; defect 'any' means at least one defect
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: share, low, high in [0, 1] of responses (95% interval over prompts); num_responses in responses; num_prompts
--   in prompts; boundary_* in steps
-- needs: responses
with responses as (
  select run_id, step, stage, prompt_id, defects
  from staged_responses
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
per_prompt as (
  select
    run_id,
    step,
    stage,
    prompt_id,
    count(*) as responses,
    count(*) filter (where len(defects) > 0) as "any",
    count(*) filter (where list_contains(defects, 'format_violation')) as format_violation,
    count(*) filter (where list_contains(defects, 'truncated')) as truncated,
    count(*) filter (where list_contains(defects, 'repetition')) as repetition,
    count(*) filter (where list_contains(defects, 'irrelevant')) as irrelevant
  from responses
  group by all
),
per_defect as (
  unpivot per_prompt
  on "any", format_violation, truncated, repetition, irrelevant
  into name defect value defective
),
per_step as (
  select
    run_id,
    step,
    stage,
    defect,
    estimate_share(list(step_prompt(step, prompt_id, defective, responses))) as share,
    sum(responses)::bigint as num_responses,
    count(*) as num_prompts
  from per_defect
  group by all
),
final as (
  select
    run_id,
    step,
    stage,
    defect,
    share.value as share,
    share.low as low,
    share.high as high,
    num_responses,
    num_prompts,
    boundary_step,
    boundary_low,
    boundary_high
  from per_step
  join stages using (run_id, stage)
  order by run_id, step, defect
)
select * from final
