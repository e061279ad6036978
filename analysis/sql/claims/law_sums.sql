-- question: E2, E3, E4. How do predicted and measured changes of entropy or log-probability vary together?
-- grain: one row per run, step, prompt, predictor, and comparison, over tokens with after-update values
-- params: $runs: list of run_id (default all)
-- units: tokens in tokens; xx, yy, xy: sums of squares and products of deviations from comparable tokens, as in
--   entropy_laws, x in units of the prediction and y in nats; own_gradient predicts log-probability, all others
--   entropy; uncertain_*, coarse_tokens as in movement_sums
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages
with listed as (
  select run_id, step, prompt_id, predictor, comparison, sums
  from entropy_law_sums
  unpivot (
    sums for predictor in (covariance, discriminator, omega, quadrants, entropy, own_gradient_of_logprob)
  )
  where $runs is null or list_contains($runs, run_id)
),
sums as (
  select
    run_id,
    step,
    prompt_id,
    if(predictor = 'own_gradient_of_logprob', 'own_gradient', predictor) as predictor,
    comparison,
    sums.tokens as tokens,
    sums.xx as xx,
    sums.yy as yy,
    sums.xy as xy
  from listed
  where sums.tokens > 0
),
changed as (
  select *, exp(logprob::double) * (1 - exp(logprob::double)) as potential
  from entropy_changes
  where $runs is null or list_contains($runs, run_id)
),
moved as (
  select
    run_id,
    step,
    prompt_id,
    count(*) filter (where potential >= 0.05) as uncertain_tokens,
    coalesce(sum(abs(dlogprob)) filter (where potential >= 0.05), 0) as uncertain_shift,
    count(*) filter (where has_short_mantissa(logprob) and has_short_mantissa(logprob_after)) as coarse_tokens
  from changed
  group by all
),
final as (
  select sums.*, moved.uncertain_tokens, moved.uncertain_shift, moved.coarse_tokens
  from sums
  join moved using (run_id, step, prompt_id)
  order by all
)
select * from final
