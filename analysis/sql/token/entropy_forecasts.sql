-- question: E5. Does entropy change between evaluations as published formulas predict from the updates between them?
-- grain: one row per run, predictor, and two consecutive evaluations of all benchmarks
-- params: $runs: list of run_id (default all)
-- units: predicted in units of the formula times the learning rate: the mean over the tokens of an update, summed over
--   updates; measured, entropy_before in nats, mean over the tokens of an evaluation; update_size in units of the
--   advantage times the learning rate: the mean of |A|, summed as predicted; from_step, to_step, num_updates,
--   num_recorded in steps, num_recorded with tokens, which stand for all
-- needs: evaluations, evaluation entropies, log-probabilities, entropies, token advantages
with evaluated as (
  select
    run_id,
    step,
    count(distinct benchmark) as num_benchmarks,
    sum(entropy_mean::double * response_length) / sum(response_length) as entropy
  from evals
  where
    entropy_mean is not null
    and response_length > 0
    and ($runs is null or list_contains($runs, run_id))
  group by all
),
-- Benchmarks differ in entropy, so that evaluations of some of them are not comparable with evaluations of all.
complete as (
  select run_id, step, entropy
  from evaluated
  qualify num_benchmarks = max(num_benchmarks) over (partition by run_id)
),
pairs as (
  select
    run_id,
    lag(step) over of_run as from_step,
    step as to_step,
    lag(entropy) over of_run as entropy_before,
    entropy - lag(entropy) over of_run as measured
  from complete
  window of_run as (partition by run_id order by step)
),
updates as (
  select *
  from update_predictions
  where $runs is null or list_contains($runs, run_id)
),
listed as (
  select run_id, step, predictor, prediction
  from updates
  unpivot (prediction for predictor in (covariance, discriminator, first_order, omega, quadrants))
),
predictors as (
  select distinct run_id, predictor
  from listed
),
-- A step without responses in the update updates nothing; a step without tokens is unknown.
recorded as (
  select steps.run_id, steps.step, coalesce(steps.lr, 1)::double as rate
  from steps
  join token_coverage using (run_id, step)
  where token_coverage.num_with_tokens > 0
),
forecasts as (
  select
    recorded.run_id,
    recorded.step,
    predictors.predictor,
    recorded.rate * if(updates.step is null, 0, listed.prediction) as predicted,
    recorded.rate * coalesce(updates.update_size, 0) as update_size
  from recorded
  join predictors on predictors.run_id = recorded.run_id
  left join updates on updates.run_id = recorded.run_id and updates.step = recorded.step
  left join listed
    on listed.run_id = recorded.run_id and listed.step = recorded.step and listed.predictor = predictors.predictor
),
final as (
  select
    pairs.run_id,
    forecasts.predictor,
    pairs.from_step,
    pairs.to_step,
    (pairs.to_step - pairs.from_step) * avg(forecasts.predicted order by forecasts.step) as predicted,
    pairs.measured,
    pairs.entropy_before,
    (pairs.to_step - pairs.from_step) * avg(forecasts.update_size order by forecasts.step) as update_size,
    pairs.to_step - pairs.from_step as num_updates,
    count(*) as num_recorded
  from pairs
  join forecasts
    on forecasts.run_id = pairs.run_id and forecasts.step > pairs.from_step and forecasts.step <= pairs.to_step
  where forecasts.predicted is not null
  group by
    pairs.run_id,
    forecasts.predictor,
    pairs.from_step,
    pairs.to_step,
    pairs.measured,
    pairs.entropy_before
  order by pairs.run_id, forecasts.predictor, pairs.to_step
)
select * from final
