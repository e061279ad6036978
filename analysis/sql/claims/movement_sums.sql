-- question: S5, S6. In the plateau, how far does the update move the probabilities of each prompt's tokens?
-- grain: one row per run, step, and prompt, over tokens with after-update values
-- params: $runs: list of run_id (default all)
-- units: *tokens in tokens; *movement: sums of |dp|; *_dp: sums of dp; *_potential: sums of p (1 - p); *_margin: sums
--   of p (1 - p) max(|logit p|, 1); uncertain_shift: sum of |d ln p| in nats
-- needs: after-update values, log-probabilities, entropies, gradient norms, token advantages
with plateau_steps as (
  select run_id, step
  from staged_steps
  where stage = 'plateau' and ($runs is null or list_contains($runs, run_id))
),
moved as (
  select
    run_id,
    step,
    prompt_id,
    advantage,
    entropy,
    grad_norm,
    dp,
    abs(dp) as movement,
    exp(logprob::double) * (1 - exp(logprob::double)) as potential,
    -- The margin is at least 1, so tokens near p = 1/2 keep a weight.
    potential * greatest(abs(logprob - ln(greatest(1 - exp(logprob::double), 1e-12))), 1) as margin,
    abs(logprob_after::double - logprob) as shift,
    has_short_mantissa(logprob) and has_short_mantissa(logprob_after) as is_coarse
  from moved_tokens
  join plateau_steps using (run_id, step)
),
-- Tokens whose probability can move: below potential 0.001, rounding errors are as large as the effect of an update.
thresholds as (
  select run_id, quantile_cont(grad_norm, 0.8) as grad_norm_threshold
  from moved
  where potential >= 0.001
  group by all
),
step_thresholds as (
  select run_id, step, quantile_cont(movement, 0.8) as movement_threshold
  from moved
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
    movement_threshold,
    potential >= 0.001 as can_move,
    entropy >= entropy_threshold as is_high_entropy,
    grad_norm >= grad_norm_threshold as is_high_gradient
  from moved
  join step_thresholds using (run_id, step)
  join entropies using (run_id)
  left join thresholds using (run_id)
),
final as (
  select
    run_id,
    step,
    prompt_id,
    count(*) as tokens,
    sum(movement) as movement,
    count(*) filter (where movement <= 0.01) as still_tokens,
    -- Adds up to the movement of exactly the top fifth of the step's tokens; ties are split.
    sum(greatest(movement - movement_threshold, 0) + 0.2 * movement_threshold) as top_movement,
    coalesce(sum(movement) filter (where can_move and is_high_entropy), 0) as high_entropy_movement,
    coalesce(sum(potential) filter (where can_move and is_high_entropy), 0) as high_entropy_potential,
    coalesce(sum(margin) filter (where can_move and is_high_entropy), 0) as high_entropy_margin,
    coalesce(sum(movement) filter (where can_move and not is_high_entropy), 0) as low_entropy_movement,
    coalesce(sum(potential) filter (where can_move and not is_high_entropy), 0) as low_entropy_potential,
    coalesce(sum(margin) filter (where can_move and not is_high_entropy), 0) as low_entropy_margin,
    coalesce(sum(movement) filter (where can_move and is_high_gradient), 0) as high_gradient_movement,
    coalesce(sum(potential) filter (where can_move and is_high_gradient), 0) as high_gradient_potential,
    coalesce(sum(margin) filter (where can_move and is_high_gradient), 0) as high_gradient_margin,
    coalesce(sum(movement) filter (where can_move and not is_high_gradient), 0) as low_gradient_movement,
    coalesce(sum(potential) filter (where can_move and not is_high_gradient), 0) as low_gradient_potential,
    coalesce(sum(margin) filter (where can_move and not is_high_gradient), 0) as low_gradient_margin,
    count(*) filter (where is_high_entropy) as high_tokens,
    coalesce(sum(movement) filter (where is_high_entropy), 0) as high_movement,
    count(*) filter (where is_high_entropy and advantage > 0) as positive_tokens,
    coalesce(sum(dp) filter (where is_high_entropy and advantage > 0), 0) as positive_dp,
    count(*) filter (where is_high_entropy and advantage < 0) as negative_tokens,
    coalesce(sum(dp) filter (where is_high_entropy and advantage < 0), 0) as negative_dp,
    count(*) filter (where potential >= 0.05) as uncertain_tokens,
    coalesce(sum(shift) filter (where potential >= 0.05), 0) as uncertain_shift,
    count(*) filter (where is_coarse) as coarse_tokens
  from marked
  group by all
  order by run_id, step, prompt_id
)
select * from final
