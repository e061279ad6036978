-- question: T3. Where in a response do updates move token probabilities most, overall and for high-entropy tokens?
-- grain: one row per run, stage, sample sign, and bin of relative position (0 = first), over tokens with after-update
--   values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $bins: integer in [1, 1000],
--   bins of position (default 10); $top: number in (0, 1], share of tokens that count as high-entropy (default 0.2)
-- units: position_mid in [0, 1]; movement, low, high: mean |dp| in probability, movement_high_entropy* likewise for
--   high-entropy tokens; dp: mean change of probability; grad_norm, grad_low, grad_high in nats; entropy in nats (95%
--   intervals over steps and prompts); num_* are counts
-- needs: after-update values, log-probabilities, entropies
with
-- dp is the change of the sampled token's probability by the update; movement is the mean |dp|. High-entropy tokens are
-- the $top share of all the stage's tokens in the update, including those without after-update values. The threshold is
-- at most 0.5% too low.
thresholds as (
  select run_id, step, stage, entropy_threshold
  from steps_with_threshold(coalesce($top, 0.2))
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
captured as (
  select
    moved.run_id,
    moved.step,
    moved.prompt_id,
    moved.advantage > 0 as is_positive,
    bin_of_position(moved.position, moved.response_length, coalesce($bins, 10)) as position_bin,
    sum(abs(moved.dp)) as movement_sum,
    sum(moved.dp) as dp_sum,
    sum(moved.grad_norm::double) as grad_sum,
    sum(moved.entropy::double) as entropy_sum,
    count(*) as tokens,
    sum(abs(moved.dp)) filter (where moved.entropy >= thresholds.entropy_threshold) as high_movement_sum,
    count(*) filter (where moved.entropy >= thresholds.entropy_threshold) as high_tokens
  from moved_tokens as moved
  join thresholds on thresholds.run_id = moved.run_id and thresholds.step = moved.step
  where moved.advantage <> 0 and ($runs is null or list_contains($runs, moved.run_id))
  group by all
),
per_prompt as (
  select captured.*, thresholds.stage, if(is_positive, 'positive', 'negative') as sample_sign
  from captured
  join thresholds on thresholds.run_id = captured.run_id and thresholds.step = captured.step
),
per_bin as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    estimate_positive(list(step_prompt(step, prompt_id, movement_sum, tokens))) as movement,
    sum(dp_sum) / sum(tokens) as dp,
    estimate_positive(list(step_prompt(step, prompt_id, grad_sum, tokens))) as grad_norm,
    sum(entropy_sum) / sum(tokens) as entropy,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts,
    estimate_positive(list(step_prompt(step, prompt_id, high_movement_sum, high_tokens))) as movement_high_entropy,
    sum(high_tokens)::bigint as num_high_entropy
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    position_bin,
    movement.value as movement,
    movement.low as low,
    movement.high as high,
    dp,
    grad_norm.value as grad_norm,
    grad_norm.low as grad_low,
    grad_norm.high as grad_high,
    entropy,
    num_tokens,
    num_prompts,
    (position_bin + 0.5) / coalesce($bins, 10)::integer as position_mid,
    movement_high_entropy.value as movement_high_entropy,
    movement_high_entropy.low as movement_high_entropy_low,
    movement_high_entropy.high as movement_high_entropy_high,
    num_high_entropy
  from per_bin
  order by run_id, stage desc, sample_sign, position_bin
)
select * from final
