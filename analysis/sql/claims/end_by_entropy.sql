-- question: T3. In the plateau, do high-entropy tokens at the end move further than those of equal entropy in the
--   middle?
-- grain: one row per run, step, prompt, bin (decile of entropy among high-entropy tokens, 0 = lowest), and part (0 =
--   middle, 1 = last fifth)
-- params: $runs: list of run_id (default all)
-- units: tokens in tokens; movement: sum of |dp| in probability; grad_norm: sum in nats
-- needs: after-update values, log-probabilities, entropies, gradient norms
with high as (
  select
    moved.run_id,
    moved.step,
    moved.prompt_id,
    (moved.relative_position >= 0.8)::integer as part,
    ntile(10) over (partition by moved.run_id order by moved.entropy, moved.rollout_id, moved.position) - 1 as bin,
    abs(moved.dp) as movement,
    moved.grad_norm::double as grad_norm
  from staged_movements as moved
  join entropy_thresholds(0.2) as thresholds
    on thresholds.run_id = moved.run_id and thresholds.stage = moved.stage
  where
    moved.stage = 'plateau'
    and moved.relative_position >= 0.2
    and moved.entropy >= thresholds.entropy_threshold
    and ($runs is null or list_contains($runs, moved.run_id))
),
final as (
  select
    run_id,
    step,
    prompt_id,
    bin,
    part,
    count(*) as tokens,
    sum(movement) as movement,
    sum(grad_norm) as grad_norm
  from high
  group by all
  order by all
)
select * from final
