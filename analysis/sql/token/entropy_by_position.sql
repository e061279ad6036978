-- question: T1. Is entropy higher at the beginning and at the end of a response than in the middle?
-- grain: one row per run, stage, sample sign and bin of relative position (0 = first), responses in the update only
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both; $bins of position, null = 10
-- units: entropy, low, high in nats per token (95 % interval, clustered by prompt); position_mid in [0, 1]
-- needs: tokens
with tokens_in_update as (
  select *, floor(relative_position * coalesce($bins, 10)::integer)::integer as position_bin
  from staged_tokens
  where
    sample_sign is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    prompt_id,
    sum(entropy) as entropy_sum,
    count(*) as tokens
  from tokens_in_update
  group by all
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    (position_bin + 0.5) / coalesce($bins, 10)::integer as position_mid,
    clustered_mean(entropy_sum, tokens) as entropy,
    clustered_low(entropy_sum, tokens) as low,
    clustered_high(entropy_sum, tokens) as high,
    sum(tokens)::bigint as num_tokens,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, stage desc, sample_sign, position_bin
)
select * from final
