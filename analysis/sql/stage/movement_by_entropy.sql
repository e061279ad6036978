-- question: S6. Do the tokens of high entropy move most: up in positive samples, down in negative ones?
-- grain: one row per run, stage, sample sign and decile of entropy (1 = lowest), over tokens with after-update values
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both
-- units: dp in probability, movement = |dp| (95 % intervals, clustered by prompt); grad_norm, entropy_mean in nats
-- needs: after-update values
with moved as (
  select
    run_id,
    stage,
    sample_sign,
    prompt_id,
    entropy,
    floor(1000 * ln(greatest(entropy, 1e-9)))::integer as bin,
    grad_norm,
    dp
  from staged_movements
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
bins as (
  select run_id, stage, bin, count(*) as tokens
  from moved
  group by all
),
-- Deciles of a run's stage, both signs together. A bin 0.1 % wide goes whole into the decile of its lowest token: ties,
-- such as many entropies of almost 0, make deciles unequal or leave some out.
deciles as (
  select
    run_id,
    stage,
    bin,
    1 + floor(
      10 * (sum(tokens) over (partition by run_id, stage order by bin) - tokens)
      / sum(tokens) over (partition by run_id, stage)
    )::integer as entropy_decile
  from bins
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    entropy_decile,
    prompt_id,
    sum(dp) as dp_sum,
    sum(abs(dp)) as movement_sum,
    sum(grad_norm::double) as grad_norm_sum,
    sum(entropy::double) as entropy_sum,
    count(*) as tokens
  from moved
  join deciles using (run_id, stage, bin)
  group by all
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    entropy_decile,
    clustered_mean(dp_sum, tokens) as dp,
    clustered_low(dp_sum, tokens) as low,
    clustered_high(dp_sum, tokens) as high,
    clustered_mean(movement_sum, tokens) as movement,
    clustered_low(movement_sum, tokens) as movement_low,
    clustered_high(movement_sum, tokens) as movement_high,
    clustered_mean(grad_norm_sum, tokens) as grad_norm,
    clustered_mean(entropy_sum, tokens) as entropy_mean,
    sum(tokens)::bigint as num_tokens,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, stage desc, sample_sign, entropy_decile
)
select * from final
