-- question: E2, E3, E4. How well do published formulas predict what an update does to the entropy of each token?
-- grain: one row per run, stage, and predictor, over tokens with after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $target: entropy or logprob,
--   whose change is predicted (default entropy); $scale: value or rank, within the step (default value)
-- units: kind: formula, gradient, property (known before the update), or outcome; correlation, low, high in [-1, 1]:
--   within steps; shuffled*: beyond a shuffle within step, sign of the advantage, and probability; random*: beyond a
--   random update (95 % intervals over steps and prompts); num_* are counts
-- needs: after-update values, log-probabilities, entropies, token advantages
with per_prompt as (
  select
    run_id,
    stage,
    predictor,
    step,
    prompt_id,
    count(*) as tokens,
    sum(prediction * prediction) as squares,
    sum(x * x) as xx,
    sum(y * y) as yy,
    sum(x * y) as xy,
    sum(shuffled_x * shuffled_x) as shuffled_xx,
    sum(shuffled_x * shuffled_y) as shuffled_xy,
    sum(random_x * random_y) as random_xy
  from centered_predictions(coalesce($target, 'entropy'), coalesce($scale, 'value'))
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
  group by all
),
totals as (
  select
    run_id,
    stage,
    predictor,
    sum(xx) / sum(tokens) as x_variance,
    sum(yy) / sum(tokens) as y_variance,
    sqrt(sum(xx) * sum(yy)) as scale,
    sum(xy) / scale as correlation,
    -- A shuffle cannot test a function of sign and probability.
    if(sum(shuffled_xx) > 1e-9 * sum(xx), sum(shuffled_xy) / scale, null) as shuffled,
    sum(random_xy) / scale as random
  from per_prompt
  group by all
  -- Smaller deviations are rounding errors of equal predictions.
  having sum(xx) > 1e-12 * (sum(squares) + 1e-6 * sum(tokens)) and sum(yy) > 0
),
-- A correlation r is the mean of x y / (sd_x sd_y) - r (x^2 / sd_x^2 + y^2 / sd_y^2) / 2 + r, whose deviations from r
-- are the influences of the tokens on r.
per_predictor as (
  select
    run_id,
    stage,
    predictor,
    estimate_difference(list(step_prompt(step, prompt_id, xy / sd + correlation * rest, tokens))) as correlation,
    estimate_difference(list(step_prompt(step, prompt_id, shuffled_xy / sd + shuffled * rest, tokens))) as shuffled,
    estimate_difference(list(step_prompt(step, prompt_id, random_xy / sd + random * rest, tokens))) as random,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts,
    count(distinct step) as num_steps
  from (
    select
      *,
      sqrt(x_variance * y_variance) as sd,
      tokens - (xx / x_variance + yy / y_variance) / 2 as rest
    from per_prompt
    join totals using (run_id, stage, predictor)
  )
  group by all
),
final as (
  select
    run_id,
    stage,
    predictor,
    case
      when predictor = 'entropy_ratio' then 'outcome'
      when predictor = 'own_gradient' then 'gradient'
      when predictor in ('entropy', 'probability', 'position', 'category', 'relative_surprisal') then 'property'
      else 'formula'
    end as kind,
    correlation.value as correlation,
    correlation.low as low,
    correlation.high as high,
    shuffled.value as shuffled,
    shuffled.low as shuffled_low,
    shuffled.high as shuffled_high,
    random.value as random,
    random.low as random_low,
    random.high as random_high,
    num_tokens,
    num_prompts,
    num_steps
  from per_predictor
  order by run_id, stage desc, kind, predictor
)
select * from final
