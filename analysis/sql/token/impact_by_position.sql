-- question: T2. Does replacing a token change the outcome more, the later the token stands?
-- grain: one row per run, series of interventions, correctness of the response and bin of relative position
-- params: $runs list of run_id, null = all; $bins of position, null = 5
-- units: impact, low, high in [-1, 1], movement*, accuracy_* in [0, 1] of accuracy (95 % interval over prompts)
-- needs: interventions
with
-- Series of another checkpoint, selection, seed or temperature stay apart. movement = mean |impact|, which chance alone
-- keeps above 0.
replacements as (
  select
    *,
    intervention_series(checkpoint_step, selection, seed, temperature) as series,
    floor(position / response_length * coalesce($bins, 5)::integer)::integer as position_bin
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
    sum(abs(impact::double)) as movement_sum,
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
    estimate_share(list(step_prompt(0, prompt_id, movement_sum, replaced))) as movement,
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
    movement.value as movement,
    movement.low as movement_low,
    movement.high as movement_high,
    accuracy_original,
    num_interventions,
    num_prompts
  from per_bin
  order by run_id, series, is_correct, position_bin
)
select * from final
