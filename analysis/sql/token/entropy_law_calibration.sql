-- question: E2, E3. Where a formula predicts a larger change of entropy, is the measured change larger in proportion?
-- grain: one row per run, stage, predictor, and bin of the prediction, over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: bin: predicted change in standard deviations, rounded to .5, at most 3 either way; predicted, measured, low,
--   high in nats per token, from the mean of the step (95% interval over steps and prompts); the prediction is scaled
--   to fit the measured change best; num_* are counts
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages
with means as (
  select
    run_id,
    stage,
    step,
    step_sums(covariance) as covariance,
    step_sums(discriminator) as discriminator,
    step_sums(omega) as omega,
    step_sums(quadrants) as quadrants,
    step_sums(entropy) as entropy
  from entropy_law_sums
  where
    comparison = 'overall'
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
  group by all
),
fits as (
  select
    run_id,
    stage,
    linear_fit(covariance) as covariance,
    linear_fit(discriminator) as discriminator,
    linear_fit(omega) as omega,
    linear_fit(quadrants) as quadrants,
    linear_fit(entropy) as entropy
  from means
  group by all
),
slopes as (
  select run_id, stage, predictor, fit.slope
  from fits
  unpivot (fit for predictor in (covariance, discriminator, omega, quadrants, entropy))
),
-- What a prediction is subtracted from and multiplied by, so that it is in standard deviations of the fit.
scales as (
  select
    means.run_id,
    means.stage,
    means.step,
    means.entropy.y_mean as change,
    means.covariance.x_mean as covariance,
    means.discriminator.x_mean as discriminator,
    means.omega.x_mean as omega,
    means.quadrants.x_mean as quadrants,
    means.entropy.x_mean as entropy,
    fits.covariance.per_sd as covariance_per_sd,
    fits.discriminator.per_sd as discriminator_per_sd,
    fits.omega.per_sd as omega_per_sd,
    fits.quadrants.per_sd as quadrants_per_sd,
    fits.entropy.per_sd as entropy_per_sd
  from means
  join fits using (run_id, stage)
),
standardized as (
  select
    predicted.run_id,
    predicted.step,
    predicted.prompt_id,
    dentropy - change as measured,
    (predicted.covariance - scales.covariance) * covariance_per_sd as covariance,
    (predicted.discriminator - scales.discriminator) * discriminator_per_sd as discriminator,
    (predicted.omega - scales.omega) * omega_per_sd as omega,
    (predicted.quadrants - scales.quadrants) * quadrants_per_sd as quadrants,
    (predicted.entropy - scales.entropy) * entropy_per_sd as entropy
  from entropy_predictions as predicted
  join scales on scales.run_id = predicted.run_id and scales.step = predicted.step
),
binned as (
  select
    *,
    half_sds(covariance) as covariance_bin,
    half_sds(discriminator) as discriminator_bin,
    half_sds(omega) as omega_bin,
    half_sds(quadrants) as quadrants_bin,
    half_sds(entropy) as entropy_bin
  from standardized
),
per_prompt as (
  select
    run_id,
    step,
    prompt_id,
    case
      when covariance_bin is not null then 'covariance'
      when discriminator_bin is not null then 'discriminator'
      when omega_bin is not null then 'omega'
      when quadrants_bin is not null then 'quadrants'
      when entropy_bin is not null then 'entropy'
    end as predictor,
    coalesce(covariance_bin, discriminator_bin, omega_bin, quadrants_bin, entropy_bin) / 2 as bin,
    case predictor
      when 'covariance' then sum(covariance)
      when 'discriminator' then sum(discriminator)
      when 'omega' then sum(omega)
      when 'quadrants' then sum(quadrants)
      when 'entropy' then sum(entropy)
    end as predicted_sum,
    sum(measured) as measured_sum,
    count(*) as tokens
  from binned
  group by
    run_id,
    step,
    prompt_id,
    grouping sets ((covariance_bin), (discriminator_bin), (omega_bin), (quadrants_bin), (entropy_bin))
),
per_bin as (
  select
    per_prompt.run_id,
    scales.stage,
    per_prompt.predictor,
    per_prompt.bin,
    any_value(slopes.slope) * sum(predicted_sum) / sum(tokens) as predicted,
    estimate(
      list(step_prompt(per_prompt.step, per_prompt.prompt_id, measured_sum, per_prompt.tokens))
    ) as measured,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  join scales on scales.run_id = per_prompt.run_id and scales.step = per_prompt.step
  join slopes
    on slopes.run_id = per_prompt.run_id and slopes.stage = scales.stage and slopes.predictor = per_prompt.predictor
  where per_prompt.bin is not null
  group by all
),
final as (
  select
    run_id,
    stage,
    predictor,
    bin,
    predicted,
    measured.value as measured,
    measured.low as low,
    measured.high as high,
    num_tokens,
    num_prompts
  from per_bin
  order by run_id, stage desc, predictor, bin
)
select * from final
