-- Means over the tokens of a step that are comparable, by comparison, from totals over the tokens of each cell.
create macro comparable_means(total, tokens, run_id, step, sign, odds_bin, entropy_bin) as {
  'overall': sum(total) over (partition by run_id, step) / sum(tokens) over (partition by run_id, step),
  'shuffle': sum(total) over (partition by run_id, step, sign, odds_bin)
  / sum(tokens) over (partition by run_id, step, sign, odds_bin),
  'random': sum(total) over (partition by run_id, step, odds_bin, entropy_bin)
  / sum(tokens) over (partition by run_id, step, odds_bin, entropy_bin)
};
-- Sums over the tokens of a prompt for a correlation of a prediction x and a change y, as deviations from the means of
-- comparable tokens, by comparison. A token without a prediction has no change either.
create macro paired_sums(x, y, x_means, y_means) as {
  'tokens': count(y),
  'squares': sum(x * x),
  'x': sum(x),
  'y': sum(y),
  'overall_xx': sum((x - x_means.overall) * (x - x_means.overall)),
  'overall_yy': sum((y - y_means.overall) * (y - y_means.overall)),
  'overall_xy': sum((x - x_means.overall) * (y - y_means.overall)),
  'shuffle_xx': sum((x - x_means.shuffle) * (x - x_means.shuffle)),
  'shuffle_yy': sum((y - y_means.shuffle) * (y - y_means.shuffle)),
  'shuffle_xy': sum((x - x_means.shuffle) * (y - y_means.shuffle)),
  'random_xx': sum((x - x_means.random) * (x - x_means.random)),
  'random_yy': sum((y - y_means.random) * (y - y_means.random)),
  'random_xy': sum((x - x_means.random) * (y - y_means.random))
};
create macro of_comparison(comparison, overall, shuffle, random) as (
  case comparison when 'overall' then overall when 'shuffle' then shuffle else random end
);
create macro compared_sums(comparison, sums) as {
  'tokens': sums.tokens,
  'squares': sums.squares,
  'x': sums.x,
  'y': sums.y,
  'xx': of_comparison(comparison, sums.overall_xx, sums.shuffle_xx, sums.random_xx),
  'yy': of_comparison(comparison, sums.overall_yy, sums.shuffle_yy, sums.random_yy),
  'xy': of_comparison(comparison, sums.overall_xy, sums.shuffle_xy, sums.random_xy)
};
-- Sums and means over the tokens of a step. The argument is the column that holds the compared_sums of its prompts.
create macro step_sums(sums) as {
  'tokens': sum(sums.tokens),
  'squares': sum(sums.squares),
  'x_mean': sum(sums.x) / sum(sums.tokens),
  'y_mean': sum(sums.y) / sum(sums.tokens),
  'xx': sum(sums.xx),
  'xy': sum(sums.xy)
};
-- The least-squares fit of a change by a prediction, from step_sums: slope in nats per standard deviation of the fitted
-- change, and what a prediction is multiplied by to be in such standard deviations. Null for a prediction that is equal
-- for all tokens up to rounding.
create macro linear_fit(sums) as (
  if(
    sum(sums.xx) > 1e-12 * (sum(sums.squares) + 1e-6 * sum(sums.tokens)),
    {
      'slope': abs(sum(sums.xy)) / sqrt(sum(sums.xx) * sum(sums.tokens)),
      'per_sd': sign(sum(sums.xy)) * sqrt(sum(sums.tokens) / sum(sums.xx))
    },
    null
  )
);
-- The nearest number of half standard deviations, at most 6 either way.
create macro half_sds(x) as round(2 * greatest(-3, least(3, x)))::tinyint;
-- Rank within a step; tied values have the mean of their ranks.
create macro mean_rank(value, run_id, step) as (
  if(
    value is null,
    null,
    rank() over (partition by run_id, step order by value) + count(*) over (partition by run_id, step, value) / 2
  )
);

-- How far do the predicted and the measured change of tokens deviate from those of comparable tokens?
-- One row per run, step, prompt, and comparison, for target 'entropy' or 'logprob', and scale 'value' or 'rank' (within
-- the step): a column per predictor with compared_sums, and own_gradient_of_logprob, whose target is always 'logprob'.
-- Comparison 'overall': tokens of the step. 'shuffle': of equal step, sign of the advantage, and probability; a shuffle
-- of the changes of these tokens leaves no correlation of x and y on average. 'random': of equal step, probability, and
-- entropy; a random update, which depends on these and not on the advantage, leaves no correlation.
create macro law_sums_by_prompt(target, scale) as table
  with predicted as not materialized (
    select
      run_id,
      step,
      prompt_id,
      sign,
      odds_bin,
      entropy_bin,
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
      category,
      if(target = 'logprob', dlogprob, dentropy) as change,
      dlogprob
    from entropy_predictions
  ),
  ranked as (
    select
      run_id,
      step,
      prompt_id,
      sign,
      odds_bin,
      entropy_bin,
      mean_rank(covariance, run_id, step) as covariance,
      mean_rank(discriminator, run_id, step) as discriminator,
      mean_rank(centered_discriminator, run_id, step) as centered_discriminator,
      mean_rank(first_order, run_id, step) as first_order,
      mean_rank(omega, run_id, step) as omega,
      mean_rank(omega_unsquared, run_id, step) as omega_unsquared,
      mean_rank(quadrants, run_id, step) as quadrants,
      mean_rank(own_gradient, run_id, step) as own_gradient,
      mean_rank(relative_surprisal, run_id, step) as relative_surprisal,
      mean_rank(entropy_ratio, run_id, step) as entropy_ratio,
      mean_rank(entropy, run_id, step) as entropy,
      mean_rank(probability, run_id, step) as probability,
      mean_rank(position, run_id, step) as position,
      mean_rank(category, run_id, step) as category,
      mean_rank(change, run_id, step) as change,
      mean_rank(dlogprob, run_id, step) as dlogprob
    from predicted
    where scale = 'rank'
  ),
  scaled as not materialized (
    select *
    from predicted
    where scale = 'value'
    union all
    select *
    from ranked
  ),
  compared as not materialized (
    select
      *,
      if(first_order is null, null, change) as first_order_change,
      if(own_gradient is null, null, change) as own_gradient_change,
      if(own_gradient is null, null, dlogprob) as own_gradient_dlogprob,
      if(category is null, null, change) as category_change
    from scaled
  ),
  totals as (
    select
      run_id,
      step,
      sign,
      odds_bin,
      entropy_bin,
      count(*) as tokens,
      count(first_order) as first_order_tokens,
      count(own_gradient) as own_gradient_tokens,
      count(category) as category_tokens,
      sum(change) as change,
      sum(first_order_change) as first_order_change,
      sum(own_gradient_change) as own_gradient_change,
      sum(own_gradient_dlogprob) as own_gradient_dlogprob,
      sum(category_change) as category_change,
      sum(covariance) as covariance,
      sum(discriminator) as discriminator,
      sum(centered_discriminator) as centered_discriminator,
      sum(first_order) as first_order,
      sum(omega) as omega,
      sum(omega_unsquared) as omega_unsquared,
      sum(quadrants) as quadrants,
      sum(own_gradient) as own_gradient,
      sum(relative_surprisal) as relative_surprisal,
      sum(entropy_ratio) as entropy_ratio,
      sum(entropy) as entropy,
      sum(probability) as probability,
      sum(position) as position,
      sum(category) as category
    from compared
    group by all
  ),
  means as (
    select
      run_id,
      step,
      sign,
      odds_bin,
      entropy_bin,
      comparable_means(change, tokens, run_id, step, sign, odds_bin, entropy_bin) as change,
      comparable_means(
        first_order_change, first_order_tokens, run_id, step, sign, odds_bin, entropy_bin
      ) as first_order_change,
      comparable_means(
        own_gradient_change, own_gradient_tokens, run_id, step, sign, odds_bin, entropy_bin
      ) as own_gradient_change,
      comparable_means(
        own_gradient_dlogprob, own_gradient_tokens, run_id, step, sign, odds_bin, entropy_bin
      ) as own_gradient_dlogprob,
      comparable_means(category_change, category_tokens, run_id, step, sign, odds_bin, entropy_bin) as category_change,
      comparable_means(covariance, tokens, run_id, step, sign, odds_bin, entropy_bin) as covariance,
      comparable_means(discriminator, tokens, run_id, step, sign, odds_bin, entropy_bin) as discriminator,
      comparable_means(
        centered_discriminator, tokens, run_id, step, sign, odds_bin, entropy_bin
      ) as centered_discriminator,
      comparable_means(first_order, first_order_tokens, run_id, step, sign, odds_bin, entropy_bin) as first_order,
      comparable_means(omega, tokens, run_id, step, sign, odds_bin, entropy_bin) as omega,
      comparable_means(omega_unsquared, tokens, run_id, step, sign, odds_bin, entropy_bin) as omega_unsquared,
      comparable_means(quadrants, tokens, run_id, step, sign, odds_bin, entropy_bin) as quadrants,
      comparable_means(own_gradient, own_gradient_tokens, run_id, step, sign, odds_bin, entropy_bin) as own_gradient,
      comparable_means(relative_surprisal, tokens, run_id, step, sign, odds_bin, entropy_bin) as relative_surprisal,
      comparable_means(entropy_ratio, tokens, run_id, step, sign, odds_bin, entropy_bin) as entropy_ratio,
      comparable_means(entropy, tokens, run_id, step, sign, odds_bin, entropy_bin) as entropy,
      comparable_means(probability, tokens, run_id, step, sign, odds_bin, entropy_bin) as probability,
      comparable_means(position, tokens, run_id, step, sign, odds_bin, entropy_bin) as position,
      comparable_means(category, category_tokens, run_id, step, sign, odds_bin, entropy_bin) as category
    from totals
  ),
  by_prompt as (
    select
      compared.run_id,
      compared.step,
      compared.prompt_id,
      paired_sums(compared.covariance, compared.change, means.covariance, means.change) as covariance,
      paired_sums(compared.discriminator, compared.change, means.discriminator, means.change) as discriminator,
      paired_sums(
        compared.centered_discriminator, compared.change, means.centered_discriminator, means.change
      ) as centered_discriminator,
      paired_sums(
        compared.first_order, compared.first_order_change, means.first_order, means.first_order_change
      ) as first_order,
      paired_sums(compared.omega, compared.change, means.omega, means.change) as omega,
      paired_sums(compared.omega_unsquared, compared.change, means.omega_unsquared, means.change) as omega_unsquared,
      paired_sums(compared.quadrants, compared.change, means.quadrants, means.change) as quadrants,
      paired_sums(
        compared.own_gradient, compared.own_gradient_change, means.own_gradient, means.own_gradient_change
      ) as own_gradient,
      paired_sums(
        compared.relative_surprisal, compared.change, means.relative_surprisal, means.change
      ) as relative_surprisal,
      paired_sums(compared.entropy_ratio, compared.change, means.entropy_ratio, means.change) as entropy_ratio,
      paired_sums(compared.entropy, compared.change, means.entropy, means.change) as entropy,
      paired_sums(compared.probability, compared.change, means.probability, means.change) as probability,
      paired_sums(compared.position, compared.change, means.position, means.change) as position,
      paired_sums(compared.category, compared.category_change, means.category, means.category_change) as category,
      paired_sums(
        compared.own_gradient, compared.own_gradient_dlogprob, means.own_gradient, means.own_gradient_dlogprob
      ) as own_gradient_of_logprob
    from compared
    join means
      on means.run_id = compared.run_id and means.step = compared.step and means.sign = compared.sign
      and means.odds_bin = compared.odds_bin and means.entropy_bin = compared.entropy_bin
    group by compared.run_id, compared.step, compared.prompt_id
  )
  select
    by_prompt.run_id,
    staged_steps.stage,
    by_prompt.step,
    by_prompt.prompt_id,
    comparisons.comparison,
    compared_sums(comparisons.comparison, by_prompt.covariance) as covariance,
    compared_sums(comparisons.comparison, by_prompt.discriminator) as discriminator,
    compared_sums(comparisons.comparison, by_prompt.centered_discriminator) as centered_discriminator,
    compared_sums(comparisons.comparison, by_prompt.first_order) as first_order,
    compared_sums(comparisons.comparison, by_prompt.omega) as omega,
    compared_sums(comparisons.comparison, by_prompt.omega_unsquared) as omega_unsquared,
    compared_sums(comparisons.comparison, by_prompt.quadrants) as quadrants,
    compared_sums(comparisons.comparison, by_prompt.own_gradient) as own_gradient,
    compared_sums(comparisons.comparison, by_prompt.relative_surprisal) as relative_surprisal,
    compared_sums(comparisons.comparison, by_prompt.entropy_ratio) as entropy_ratio,
    compared_sums(comparisons.comparison, by_prompt.entropy) as entropy,
    compared_sums(comparisons.comparison, by_prompt.probability) as probability,
    compared_sums(comparisons.comparison, by_prompt.position) as position,
    compared_sums(comparisons.comparison, by_prompt.category) as category,
    compared_sums(comparisons.comparison, by_prompt.own_gradient_of_logprob) as own_gradient_of_logprob
  from by_prompt
  join staged_steps on staged_steps.run_id = by_prompt.run_id and staged_steps.step = by_prompt.step
  cross join (values ('overall'), ('shuffle'), ('random')) as comparisons (comparison);

-- Sums of law_sums_by_prompt for the change of entropy, without ranks. These rows are kept while the runs are open.
create view entropy_law_sums as
select *
from law_sums_by_prompt('entropy', 'value');
