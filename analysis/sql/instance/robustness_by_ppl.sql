-- question: I2. Does replacing a token change the outcome of low-perplexity responses less often?
-- grain: one row per run, intervention series, correctness of the response, and perplexity tercile in its group (1 =
--   lowest)
-- params: $runs: list of run_id (default all)
-- units: impact, low, high in [-1, 1] of accuracy; abs_impact, abs_impact_low, abs_impact_high: mean |impact| in [0, 1]
--   (95% intervals over prompts); accuracy_original, accuracy_alternative in [0, 1]; num_* are counts
-- needs: interventions
with
-- Series with different checkpoints, selections, seeds, or temperatures are kept separate. abs_impact is the mean
-- |impact|, which chance alone makes positive.
per_prompt as (
  select
    run_id,
    intervention_series(checkpoint_step, selection, seed, temperature) as series,
    is_correct,
    ppl_tercile,
    prompt_id,
    sum(impact::double) as impact_sum,
    sum(abs(impact::double)) as abs_impact_sum,
    sum(accuracy_original::double) as original_sum,
    sum(accuracy_alternative::double) as alternative_sum,
    count(*) as replaced
  from interventions
  where $runs is null or list_contains($runs, run_id)
  group by all
),
per_tercile as (
  select
    run_id,
    series,
    is_correct,
    ppl_tercile,
    estimate_difference(list(step_prompt(0, prompt_id, impact_sum, replaced))) as impact,
    estimate_share(list(step_prompt(0, prompt_id, abs_impact_sum, replaced))) as abs_impact,
    sum(original_sum) / sum(replaced) as accuracy_original,
    sum(alternative_sum) / sum(replaced) as accuracy_alternative,
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
    ppl_tercile,
    impact.value as impact,
    impact.low as low,
    impact.high as high,
    abs_impact.value as abs_impact,
    abs_impact.low as abs_impact_low,
    abs_impact.high as abs_impact_high,
    accuracy_original,
    accuracy_alternative,
    num_interventions,
    num_prompts
  from per_tercile
  order by run_id, series, is_correct, ppl_tercile
)
select * from final
