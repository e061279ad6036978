-- question: E1. Is accuracy gained at the cost of entropy, as accuracy = b - a exp(entropy) (arXiv 2505.22617)?
-- grain: one row per run and step, with the least-squares fit of the run over all selected steps
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: entropy in nats per token; exp_entropy is exp(entropy); accuracy, accuracy_fit in [0, 1]; a, b, and ceiling in
--   units of accuracy, ceiling = b - a is the accuracy at entropy 0; r2 in [0, 1]; num_steps in steps
-- needs: steps, step entropies, accuracies
with steps_of_runs as (
  select
    run_id,
    step,
    stage,
    entropy_token_mean::double as entropy,
    exp(entropy_token_mean::double) as exp_entropy,
    accuracy::double as accuracy
  from staged_steps
  where
    entropy_token_mean is not null
    and accuracy is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
fits as (
  select
    run_id,
    -regr_slope(accuracy, exp_entropy) as a,
    regr_intercept(accuracy, exp_entropy) as b,
    regr_r2(accuracy, exp_entropy) as r2,
    regr_count(accuracy, exp_entropy)::bigint as num_steps
  from steps_of_runs
  group by all
  having var_pop(exp_entropy) > 0
),
final as (
  select
    s.run_id,
    runs.arm,
    runs.seed,
    s.step,
    s.stage,
    s.entropy,
    s.exp_entropy,
    s.accuracy,
    fits.b - fits.a * s.exp_entropy as accuracy_fit,
    fits.a,
    fits.b,
    fits.b - fits.a as ceiling,
    fits.r2,
    fits.num_steps
  from steps_of_runs as s
  left join fits on fits.run_id = s.run_id
  left join runs on runs.run_id = s.run_id
  order by s.run_id, s.step
)
select * from final
