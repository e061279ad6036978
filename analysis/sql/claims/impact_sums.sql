-- question: I2, T2. How much accuracy does replacing a token cost correct responses, by perplexity and position?
-- grain: one row per run, series (checkpoint, selection, seed, and temperature), and prompt, over correct responses
-- params: $runs: list of run_id (default all)
-- units: *_impact: sums of accuracy with the original token minus accuracy with the alternative; *_tokens in
--   interventions
-- needs: interventions
with correct_responses as (
  select *, position / response_length as relative_position
  from interventions
  where is_correct and ($runs is null or list_contains($runs, run_id))
),
final as (
  select
    run_id,
    checkpoint_step,
    selection,
    seed,
    temperature,
    prompt_id,
    count(*) filter (where ppl_tercile = 1) as low_ppl_tokens,
    coalesce(sum(impact::double) filter (where ppl_tercile = 1), 0) as low_ppl_impact,
    count(*) filter (where ppl_tercile = 3) as high_ppl_tokens,
    coalesce(sum(impact::double) filter (where ppl_tercile = 3), 0) as high_ppl_impact,
    count(*) filter (where relative_position < 0.5) as early_tokens,
    coalesce(sum(impact::double) filter (where relative_position < 0.5), 0) as early_impact,
    count(*) filter (where relative_position >= 0.5) as late_tokens,
    coalesce(sum(impact::double) filter (where relative_position >= 0.5), 0) as late_impact
  from correct_responses
  group by all
  order by all
)
select * from final
