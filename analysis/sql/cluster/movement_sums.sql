-- question: S5, S6, T3. How much did the update move the probability of each prompt's tokens, in the plateau?
-- grain: one row per run, step and prompt, over tokens with after-update values
-- params: $runs list of run_id, null = all
-- units: *movement = sums of |dp|, *_dp of dp; *tokens in tokens, still = |dp| <= .01; *_grad_norm in nats
-- needs: after-update values
with moved as (
  select
    run_id,
    step,
    prompt_id,
    sample_sign,
    relative_position,
    entropy,
    grad_norm,
    dp
  from staged_movements
  where stage = 'plateau' and ($runs is null or list_contains($runs, run_id))
),
-- Top fifth of |dp| and of gradient norms, from histograms 0.1 % wide: thresholds are at most 0.1 % too low.
bins as (
  select
    run_id,
    unnest([
      {'measure': 'movement', 'bin': floor(1000 * ln(greatest(abs(dp), 1e-12)))},
      {'measure': 'grad_norm', 'bin': floor(1000 * ln(greatest(grad_norm, 1e-12)))}
    ], recursive := true)
  from moved
),
counted as (
  select run_id, measure, bin, count(*) as tokens
  from bins
  group by all
),
ranked as (
  select
    *,
    sum(tokens) over (partition by run_id, measure order by bin desc) as tokens_from,
    sum(tokens) over (partition by run_id, measure) as tokens_all
  from counted
),
thresholds as (
  select
    run_id,
    exp(min(bin) filter (where measure = 'movement') / 1000) as movement_threshold,
    exp(min(bin) filter (where measure = 'grad_norm') / 1000) as grad_norm_threshold
  from ranked
  where tokens_from - tokens < 0.2 * tokens_all
  group by all
),
entropies as (
  select run_id, entropy_threshold
  from entropy_thresholds(0.2)
  where stage = 'plateau'
),
marked as (
  select
    moved.*,
    abs(dp) as movement,
    movement_threshold,
    entropy >= entropy_threshold as is_high_entropy,
    grad_norm >= grad_norm_threshold as is_high_gradient
  from moved
  join thresholds using (run_id)
  join entropies using (run_id)
),
final as (
  select
    run_id,
    step,
    prompt_id,
    count(*) as tokens,
    sum(movement) as movement,
    count(*) filter (where movement <= 0.01) as still_tokens,
    -- Adds up to what exactly the top fifth moves, ties shared out, and hardly depends on the threshold's own error.
    sum(greatest(movement - movement_threshold, 0) + 0.2 * movement_threshold) as top_movement,
    count(*) filter (where is_high_entropy) as high_entropy_tokens,
    coalesce(sum(movement) filter (where is_high_entropy), 0) as high_entropy_movement,
    count(*) filter (where is_high_gradient) as high_gradient_tokens,
    coalesce(sum(movement) filter (where is_high_gradient), 0) as high_gradient_movement,
    count(*) filter (where is_high_entropy and sample_sign = 'positive') as positive_tokens,
    coalesce(sum(dp) filter (where is_high_entropy and sample_sign = 'positive'), 0) as positive_dp,
    count(*) filter (where is_high_entropy and sample_sign = 'negative') as negative_tokens,
    coalesce(sum(dp) filter (where is_high_entropy and sample_sign = 'negative'), 0) as negative_dp,
    count(*) filter (where is_high_entropy and relative_position >= 0.8) as end_tokens,
    coalesce(sum(movement) filter (where is_high_entropy and relative_position >= 0.8), 0) as end_movement,
    coalesce(sum(grad_norm::double) filter (where is_high_entropy and relative_position >= 0.8), 0) as end_grad_norm,
    count(*) filter (where is_high_entropy and relative_position >= 0.2 and relative_position < 0.8) as middle_tokens,
    coalesce(
      sum(movement) filter (where is_high_entropy and relative_position >= 0.2 and relative_position < 0.8), 0
    ) as middle_movement,
    coalesce(
      sum(grad_norm::double) filter (where is_high_entropy and relative_position >= 0.2 and relative_position < 0.8), 0
    ) as middle_grad_norm
  from marked
  group by all
  order by run_id, step, prompt_id
)
select * from final
