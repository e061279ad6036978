-- question: E2, E3, E4. How well do published formulas predict what an update does to the entropy of each token?
-- grain: one row per run, stage, predictor, and comparison, over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $target: entropy or logprob,
--   whose change is predicted (default entropy); $scale: value or rank, within the step (default value)
-- units: kind: formula, gradient, property (known before the update), or outcome; correlation, low, high in [-1, 1]
--   (95% interval over steps and prompts); comparison: overall (tokens of a step), shuffle (tokens of equal sign of
--   the advantage and probability as well), or random (tokens of equal probability and entropy as well); num_* are
--   counts
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages
with wide as (
  select *
  from entropy_law_sums
  where coalesce($target, 'entropy') = 'entropy' and coalesce($scale, 'value') = 'value'
  union all
  select *
  from law_sums_by_prompt(coalesce($target, 'entropy'), coalesce($scale, 'value'))
  where $target = 'logprob' or $scale = 'rank'
),
per_prompt as (
  select
    run_id,
    stage,
    step,
    prompt_id,
    comparison,
    predictor,
    sums.tokens as tokens,
    sums.squares as squares,
    sums.xx as xx,
    sums.yy as yy,
    sums.xy as xy
  from wide
  unpivot (
    sums for predictor in (
      covariance,
      discriminator,
      centered_discriminator,
      first_order,
      omega,
      omega_unsquared,
      quadrants,
      own_gradient,
      relative_surprisal,
      entropy_ratio,
      entropy,
      probability,
      position,
      category
    )
  )
  where
    sums.tokens > 0
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
totals as (
  select
    run_id,
    stage,
    predictor,
    comparison,
    sum(xx) / sum(tokens) as x_variance,
    sum(yy) / sum(tokens) as y_variance,
    sum(xy) / sum(tokens) / sqrt(x_variance * y_variance) as r
  from per_prompt
  group by all
  -- Smaller deviations are rounding errors of equal predictions. A shuffle cannot test a function of sign and
  -- probability, which has none.
  having sum(xx) > 1e-12 * (sum(squares) + 1e-6 * sum(tokens)) and sum(yy) > 0
),
-- A correlation r is the mean of x y / (sd_x sd_y) - r (x^2 / sd_x^2 + y^2 / sd_y^2) / 2 + r, whose deviations from r
-- are the influences of the tokens on r.
influences as (
  select
    run_id,
    stage,
    predictor,
    comparison,
    step,
    prompt_id,
    tokens,
    xy / sqrt(x_variance * y_variance) + r * (tokens - (xx / x_variance + yy / y_variance) / 2) as influence
  from per_prompt
  join totals using (run_id, stage, predictor, comparison)
),
estimated as (
  select
    run_id,
    stage,
    predictor,
    comparison,
    estimate_difference(list(step_prompt(step, prompt_id, influence, tokens))) as correlation,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts,
    count(distinct step) as num_steps
  from influences
  group by all
),
final as (
  select
    run_id,
    stage,
    case
      when predictor = 'entropy_ratio' then 'outcome'
      when predictor = 'own_gradient' then 'gradient'
      when predictor in ('entropy', 'probability', 'position', 'category', 'relative_surprisal') then 'property'
      else 'formula'
    end as kind,
    predictor,
    comparison,
    correlation.value as correlation,
    correlation.low as low,
    correlation.high as high,
    num_tokens,
    num_prompts,
    num_steps
  from estimated
  order by run_id, stage desc, kind, predictor, comparison
)
select * from final
