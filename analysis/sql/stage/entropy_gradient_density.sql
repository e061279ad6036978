-- question: S6. Do tokens of high entropy have large gradients?
-- grain: one row per run, stage, sample sign and occupied cell of log10 entropy (0.125) by log10 gradient norm (0.15)
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both
-- units: *_low in nats; share of the sign's tokens; correlation of the logs, low, high (mean of steps, 95 % interval)
-- needs: tokens
with logs as (
  select
    run_id,
    stage,
    sample_sign,
    step,
    log10(entropy::double) as log_entropy,
    log10(grad_norm::double) as log_grad_norm
  from staged_tokens
  where
    sample_sign is not null
    and entropy > 0
    and grad_norm > 0
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
-- Cells cover 1e-4 to 10 nats of entropy and 1e-4 to 100 of the norm; the outermost take in what lies beyond.
celled as (
  select
    *,
    greatest(0, least(39, floor((log_entropy + 4) / 0.125)))::integer as entropy_bin,
    greatest(0, least(39, floor((log_grad_norm + 4) / 0.15)))::integer as grad_norm_bin
  from logs
),
-- Cells and steps in one pass over the tokens.
counted as (
  select
    run_id,
    stage,
    sample_sign,
    entropy_bin,
    grad_norm_bin,
    step,
    count(*) as tokens,
    corr(log_entropy, log_grad_norm) as correlation
  from celled
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
    clustered_mean(correlation, 1) as correlation,
    clustered_low(correlation, 1) as low,
    clustered_high(correlation, 1) as high,
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
    tokens / sum(tokens) over (partition by counted.run_id, counted.stage, counted.sample_sign) as share,
    correlations.correlation,
    correlations.low,
    correlations.high,
    correlations.num_steps
  from counted
  left join correlations using (run_id, stage, sample_sign)
  where step is null
  order by run_id, stage desc, sample_sign, entropy_low, grad_norm_low
)
select * from final
