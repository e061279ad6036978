-- question: S6. Do high-entropy tokens have large gradients?
-- grain: one row per run, stage, sample sign, and nonempty cell of log10 entropy (width 0.125) by log10 gradient norm
--   (width 0.15)
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: entropy_low, grad_norm_low in nats, lower edges of the cell; share in [0, 1] of the sign's tokens; num_tokens
--   in tokens; correlation, low, high in [-1, 1], correlation of the logarithms averaged over num_steps steps (95%
--   interval over steps)
-- needs: tokens, entropies, gradient norms, token advantages
with steps_of_stage as (
  select run_id, step, stage, step_weight, token_weight
  from token_steps
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
logs as (
  select
    run_id,
    step,
    advantage > 0 as is_positive,
    log10(entropy::double) as log_entropy,
    log10(grad_norm::double) as log_grad_norm
  from tokens
  where
    is_kept
    and advantage <> 0
    and entropy > 0
    and grad_norm > 0
    and ($runs is null or list_contains($runs, run_id))
),
-- Cells cover entropies of 1e-4 to 10 nats and gradient norms of 1e-4 to 100; the outermost cells include all values
-- beyond. Sums are joined with stages, because joining every token would take most of the time.
per_step as (
  select
    run_id,
    step,
    is_positive,
    greatest(0, least(39, floor((log_entropy + 4) / 0.125)))::tinyint as entropy_bin,
    greatest(0, least(39, floor((log_grad_norm + 4) / 0.15)))::tinyint as grad_norm_bin,
    count(*) as tokens,
    sum(log_entropy) as x,
    sum(log_grad_norm) as y,
    sum(log_entropy * log_entropy) as xx,
    sum(log_grad_norm * log_grad_norm) as yy,
    sum(log_entropy * log_grad_norm) as xy
  from logs
  group by all
),
staged as (
  select per_step.*, stage, step_weight, token_weight, if(is_positive, 'positive', 'negative') as sample_sign
  from per_step
  join steps_of_stage using (run_id, step)
),
counted as (
  select
    run_id,
    stage,
    sample_sign,
    entropy_bin,
    grad_norm_bin,
    step,
    sum(tokens)::bigint as tokens,
    sum(tokens * token_weight) as weighted_tokens,
    any_value(step_weight) as step_weight,
    (sum(xy) - sum(x) * sum(y) / sum(tokens))
    / sqrt(
      greatest(sum(xx) - sum(x) * sum(x) / sum(tokens), 0) * greatest(sum(yy) - sum(y) * sum(y) / sum(tokens), 0)
    ) as correlation
  from staged
  group by grouping sets (
    (run_id, stage, sample_sign, entropy_bin, grad_norm_bin),
    (run_id, stage, sample_sign, step)
  )
),
correlations as (
  select
    run_id,
    stage,
    sample_sign,
    estimate(list(step_prompt(step, step, correlation * step_weight, step_weight))) as correlation,
    count(*) as num_steps
  from counted
  where step is not null and isfinite(correlation)
  group by all
),
final as (
  select
    counted.run_id,
    counted.stage,
    counted.sample_sign,
    pow(10, entropy_bin * 0.125 - 4) as entropy_low,
    pow(10, grad_norm_bin * 0.15 - 4) as grad_norm_low,
    tokens as num_tokens,
    weighted_tokens
    / sum(weighted_tokens) over (partition by counted.run_id, counted.stage, counted.sample_sign) as share,
    correlations.correlation.value as correlation,
    correlations.correlation.low as low,
    correlations.correlation.high as high,
    correlations.num_steps
  from counted
  left join correlations using (run_id, stage, sample_sign)
  where step is null
  order by run_id, stage desc, sample_sign, entropy_low, grad_norm_low
)
select * from final
