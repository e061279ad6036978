-- question: T3. Where in a response do updates move the probability of tokens most, and that of high-entropy ones?
-- grain: one row per run, stage, sample sign and bin of relative position (0 = first), tokens with after-update values
-- params: $runs list of run_id, null = all; $stage, null = both; $bins of position, null = 10; $top share, null = 0.2
-- units: movement*, dp in probability; grad_* as tokens.grad_norm; entropy in nats (95 % interval, clustered by prompt)
-- needs: after-update values
with
-- dp = change of the sampled token's probability by the update, movement = mean |dp|. High-entropy: the $top share of
-- the stage's tokens in the update, captured or not, by a threshold that is at most 0.5 % too low.
captured as (
  select
    moved.run_id,
    moved.stage,
    moved.sample_sign,
    floor(moved.relative_position * coalesce($bins, 10)::integer)::integer as position_bin,
    moved.prompt_id,
    moved.entropy::double as entropy,
    moved.grad_norm::double as grad_norm,
    moved.dp,
    moved.entropy >= thresholds.entropy_threshold as is_high_entropy
  from staged_movements as moved
  join entropy_thresholds(coalesce($top, 0.2)) as thresholds
    on thresholds.run_id = moved.run_id and thresholds.stage = moved.stage
  where ($runs is null or list_contains($runs, moved.run_id)) and ($stage is null or moved.stage = $stage)
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    prompt_id,
    sum(abs(dp)) as movement_sum,
    sum(dp) as dp_sum,
    sum(grad_norm) as grad_sum,
    sum(entropy) as entropy_sum,
    count(*) as tokens,
    sum(abs(dp)) filter (where is_high_entropy) as high_movement_sum,
    count(*) filter (where is_high_entropy) as high_tokens
  from captured
  group by all
),
all_tokens as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    clustered_mean(movement_sum, tokens) as movement,
    as_share(clustered_low(movement_sum, tokens)) as low,
    as_share(clustered_high(movement_sum, tokens)) as high,
    clustered_mean(dp_sum, tokens) as dp,
    clustered_mean(grad_sum, tokens) as grad_norm,
    clustered_low(grad_sum, tokens) as grad_low,
    clustered_high(grad_sum, tokens) as grad_high,
    clustered_mean(entropy_sum, tokens) as entropy,
    sum(tokens)::bigint as num_tokens,
    count(*) as num_prompts
  from per_prompt
  group by all
),
high_entropy_tokens as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    clustered_mean(high_movement_sum, high_tokens) as movement_high_entropy,
    as_share(clustered_low(high_movement_sum, high_tokens)) as movement_high_entropy_low,
    as_share(clustered_high(high_movement_sum, high_tokens)) as movement_high_entropy_high,
    sum(high_tokens)::bigint as num_high_entropy
  from per_prompt
  where high_tokens > 0
  group by all
),
final as (
  select
    all_tokens.*,
    (position_bin + 0.5) / coalesce($bins, 10)::integer as position_mid,
    movement_high_entropy,
    movement_high_entropy_low,
    movement_high_entropy_high,
    coalesce(num_high_entropy, 0) as num_high_entropy
  from all_tokens
  left join high_entropy_tokens using (run_id, stage, sample_sign, position_bin)
  order by run_id, stage desc, sample_sign, position_bin
)
select * from final
