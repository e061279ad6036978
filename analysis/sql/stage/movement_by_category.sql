-- question: S6. Which kinds of tokens does an update move: up in positive samples, down in negative ones?
-- grain: one row per run, stage, sample sign and token category, over tokens with after-update values
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both
-- units: dp in probability, movement = |dp| (95 % intervals, clustered by prompt); grad_norm in nats
-- needs: after-update values
with per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    category,
    prompt_id,
    sum(dp) as dp_sum,
    sum(abs(dp)) as movement_sum,
    sum(grad_norm::double) as grad_norm_sum,
    count(*) as tokens
  from staged_movements
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
  group by all
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    category,
    clustered_mean(dp_sum, tokens) as dp,
    clustered_low(dp_sum, tokens) as low,
    clustered_high(dp_sum, tokens) as high,
    clustered_mean(movement_sum, tokens) as movement,
    clustered_low(movement_sum, tokens) as movement_low,
    clustered_high(movement_sum, tokens) as movement_high,
    clustered_mean(grad_norm_sum, tokens) as grad_norm,
    sum(tokens)::bigint as num_tokens,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, stage desc, sample_sign, category
)
select * from final
