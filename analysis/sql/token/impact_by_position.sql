-- question: T2. Does replacing a token change the outcome more, the later the token occurs?
-- grain: one row per run, intervention series, correctness of the response, and bin of relative position (0 = first)
-- params: $runs: list of run_id (default all); $bins: integer in [1, 1000], bins of position (default 5)
-- units: position_mid in [0, 1]; impact, low, high in [-1, 1] of accuracy; abs_impact, abs_impact_low, abs_impact_high:
--   mean |impact| in [0, 1] (95% intervals over prompts); accuracy_original in [0, 1]; num_* are counts
-- needs: interventions
with
-- Series with different checkpoints, selections, seeds, or temperatures are kept separate. abs_impact is the mean
-- |impact|, which chance alone makes positive.
replacements as (
  select
    *,
    intervention_series(checkpoint_step, selection, seed, temperature) as series,
    bin_of_position(position, response_length, coalesce($bins, 5)) as position_bin
  from interventions
  where $runs is null or list_contains($runs, run_id)
),
per_prompt as (
  select
    run_id,
    series,
    is_correct,
    position_bin,
    prompt_id,
    sum(impact::double) as impact_sum,
    sum(abs(impact::double)) as abs_impact_sum,
    sum(accuracy_original::double) as original_sum,
    count(*) as replaced
  from replacements
  group by all
),
per_bin as (
  select
    run_id,
    series,
    is_correct,
    position_bin,
    (position_bin + 0.5) / coalesce($bins, 5)::integer as position_mid,
    estimate_difference(list(step_prompt(0, prompt_id, impact_sum, replaced))) as impact,
    estimate_share(list(step_prompt(0, prompt_id, abs_impact_sum, replaced))) as abs_impact,
    sum(original_sum) / sum(replaced) as accuracy_original,
    sum(replaced)::bigint as num_interventions,
    count(*) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    series,
    is_correct,
    position_bin,
    position_mid,
    impact.value as impact,
    impact.low as low,
    impact.high as high,
    abs_impact.value as abs_impact,
    abs_impact.low as abs_impact_low,
    abs_impact.high as abs_impact_high,
    accuracy_original,
    num_interventions,
    num_prompts
  from per_bin
  order by run_id, series, is_correct, position_bin
)
select * from final
