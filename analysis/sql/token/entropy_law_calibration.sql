-- question: E2, E3. Where a formula predicts a larger change of entropy, is the measured change larger in proportion?
-- grain: one row per run, stage, predictor, and decile of the prediction (1 = largest fall), over tokens with
--   after-update values; ties can make deciles unequal or empty
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: predicted, measured, low, high in nats per token, from the mean of the step (95 % interval over steps and
--   prompts); the prediction is scaled to fit the measured change best; num_* are counts
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages
with chosen as (
  select *
  from centered_predictions('entropy', 'value', ['covariance', 'discriminator', 'omega', 'quadrants', 'entropy'])
  where
    comparison = 'overall'
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
slopes as (
  select run_id, stage, predictor, sum(x * y order by x, y) / sum(x * x order by abs(x)) as slope
  from chosen
  group by all
  having sum(x * x) > 1e-12 * (sum(prediction * prediction) + 1e-6 * count(*))
),
scaled as (
  select chosen.*, slope * x as predicted
  from chosen
  join slopes using (run_id, stage, predictor)
),
ranked as (
  select
    *,
    1 + (10 * (rank() over by_predicted - 1)) // count(*) over of_predictor as decile
  from scaled
  window
    of_predictor as (partition by run_id, stage, predictor),
    by_predicted as (partition by run_id, stage, predictor order by predicted)
),
per_prompt as (
  select
    run_id,
    stage,
    predictor,
    decile,
    step,
    prompt_id,
    sum(predicted order by predicted) as predicted_sum,
    sum(y order by y) as measured_sum,
    count(*) as tokens
  from ranked
  group by all
),
per_decile as (
  select
    run_id,
    stage,
    predictor,
    decile,
    sum(predicted_sum order by predicted_sum) / sum(tokens) as predicted,
    estimate(list(step_prompt(step, prompt_id, measured_sum, tokens))) as measured,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    predictor,
    decile,
    predicted,
    measured.value as measured,
    measured.low as low,
    measured.high as high,
    num_tokens,
    num_prompts
  from per_decile
  order by run_id, stage desc, predictor, decile
)
select * from final
