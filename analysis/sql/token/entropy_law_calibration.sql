-- question: E2, E3. Where a formula predicts a larger change of entropy, is the measured change larger in proportion?
-- grain: one row per run, stage, predictor, and bin of the prediction, over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: bin: predicted change in standard deviations, rounded to .5, at most 3 either way; predicted, measured, low,
--   high in nats per token, from the mean of the step (95% interval over steps and prompts); the prediction is scaled
--   to fit the measured change best; num_* are counts
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages
with chosen as (
  select run_id, stage, step, prompt_id, dentropy, covariance, discriminator, omega, quadrants, entropy
  from entropy_predictions
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
means as (
  select
    run_id,
    stage,
    step,
    count(*) as tokens,
    avg(dentropy) as change,
    step_sums(covariance, dentropy) as covariance,
    step_sums(discriminator, dentropy) as discriminator,
    step_sums(omega, dentropy) as omega,
    step_sums(quadrants, dentropy) as quadrants,
    step_sums(entropy, dentropy) as entropy
  from chosen
  group by all
),
fits as (
  select
    run_id,
    stage,
    linear_fit(tokens, covariance.squares, covariance.xx, covariance.xy) as covariance,
    linear_fit(tokens, discriminator.squares, discriminator.xx, discriminator.xy) as discriminator,
    linear_fit(tokens, omega.squares, omega.xx, omega.xy) as omega,
    linear_fit(tokens, quadrants.squares, quadrants.xx, quadrants.xy) as quadrants,
    linear_fit(tokens, entropy.squares, entropy.xx, entropy.xy) as entropy
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
    means.change,
    means.covariance.mean as covariance,
    means.discriminator.mean as discriminator,
    means.omega.mean as omega,
    means.quadrants.mean as quadrants,
    means.entropy.mean as entropy,
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
    chosen.run_id,
    chosen.stage,
    chosen.step,
    chosen.prompt_id,
    dentropy - change as measured,
    (chosen.covariance - scales.covariance) * covariance_per_sd as covariance,
    (chosen.discriminator - scales.discriminator) * discriminator_per_sd as discriminator,
    (chosen.omega - scales.omega) * omega_per_sd as omega,
    (chosen.quadrants - scales.quadrants) * quadrants_per_sd as quadrants,
    (chosen.entropy - scales.entropy) * entropy_per_sd as entropy
  from chosen
  join scales on scales.run_id = chosen.run_id and scales.step = chosen.step
),
binned as (
  select
    *,
    half_sd_bin(covariance) as covariance_bin,
    half_sd_bin(discriminator) as discriminator_bin,
    half_sd_bin(omega) as omega_bin,
    half_sd_bin(quadrants) as quadrants_bin,
    half_sd_bin(entropy) as entropy_bin
  from standardized
),
per_prompt as (
  select
    run_id,
    stage,
    step,
    prompt_id,
    case
      when covariance_bin is not null then 'covariance'
      when discriminator_bin is not null then 'discriminator'
      when omega_bin is not null then 'omega'
      when quadrants_bin is not null then 'quadrants'
      when entropy_bin is not null then 'entropy'
    end as predictor,
    coalesce(covariance_bin, discriminator_bin, omega_bin, quadrants_bin, entropy_bin) as bin,
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
    stage,
    step,
    prompt_id,
    grouping sets ((covariance_bin), (discriminator_bin), (omega_bin), (quadrants_bin), (entropy_bin))
),
per_bin as (
  select
    run_id,
    stage,
    predictor,
    bin,
    any_value(slope) * sum(predicted_sum) / sum(tokens) as predicted,
    estimate(list(step_prompt(step, prompt_id, measured_sum, tokens))) as measured,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  join slopes using (run_id, stage, predictor)
  where bin is not null
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
