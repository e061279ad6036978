-- question: T2. Does replacing a token change the outcome more, the later the token stands?
-- grain: one row per run, correctness of the response and bin of the token's relative position (0 = first)
-- params: $runs list of run_id, null = all; $bins of position, null = 5
-- units: impact, low, high in [-1, 1], movement*, accuracy_* in [0, 1] of accuracy (95 % interval, clustered by prompt)
-- needs: interventions
with
-- All checkpoints and seeds together. movement = mean |impact|, which chance alone keeps above 0.
replacements as (
  select *, floor(position / response_length * coalesce($bins, 5)::integer)::integer as position_bin
  from interventions
  where $runs is null or list_contains($runs, run_id)
),
per_prompt as (
  select
    run_id,
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
final as (
  select
    run_id,
    is_correct,
    position_bin,
    (position_bin + 0.5) / coalesce($bins, 5)::integer as position_mid,
    clustered_mean(impact_sum, replaced) as impact,
    clustered_low(impact_sum, replaced) as low,
    clustered_high(impact_sum, replaced) as high,
    clustered_mean(movement_sum, replaced) as movement,
    as_share(clustered_low(movement_sum, replaced)) as movement_low,
    as_share(clustered_high(movement_sum, replaced)) as movement_high,
    clustered_mean(original_sum, replaced) as accuracy_original,
    sum(replaced)::bigint as num_interventions,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, is_correct, position_bin
)
select * from final
