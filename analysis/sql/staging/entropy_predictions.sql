-- Published formulas for the change of entropy at a token by an update. Each value is the predicted change up to a
-- common factor, the step size: positive if entropy is predicted to rise. With p the probability of the sampled token,
-- H the entropy, and A the advantage in the loss, a gradient step on the logits of one token alone,
-- dz_v = A ([v = token] - p_v), changes the entropy to first order by -A (p (H + ln p) - sum_v p_v^2 (H + ln p_v)),
-- the first_order_law. Traces hold the sum over the vocabulary if record.vocabulary_sums was set. The abstract of
-- entropy polarity (arXiv 2605.11775) describes such a sum with a sampled and a distributional part; its equation could
-- not be verified.

-- -(ln p - mean ln p) (A - mean A), means over the tokens of the step's update (arXiv 2505.22617, code of Clip-Cov and
-- KL-Cov). In the paper's theorem, the covariance is over the vocabulary of one state.
create macro covariance_law(logprob, advantage, logprob_mean, advantage_mean) as (
  -(logprob - logprob_mean) * (advantage - advantage_mean)
);

-- -A p (H + ln p) (arXiv 2602.03392, S*). The released code of Clip_B subtracts the mean of S* over the batch; the
-- paper's theorem subtracts its mean over the vocabulary.
create macro discriminator(logprob, entropy) as exp(logprob) * (entropy + logprob);
create macro discriminator_law(logprob, entropy, advantage) as -advantage * discriminator(logprob, entropy);
create macro centered_discriminator_law(logprob, entropy, advantage, discriminator_mean) as (
  -advantage * (discriminator(logprob, entropy) - discriminator_mean)
);

-- The token's own terms are -A p (1 - p) (H + ln p); the recorded sums are over all other entries of the vocabulary.
create macro first_order_law(logprob, entropy, advantage, sum_p2_others, sum_p2_logp_others) as (
  -advantage * (discriminator(logprob, entropy) * (1 - exp(logprob)) - sum_p2_others * entropy - sum_p2_logp_others)
);

-- -A (1 - p)^2 (H + ln p) (arXiv 2510.10150, Omega of STEER). The released code has A / p_old * p (1 - p)^2 (H + ln p),
-- which is equal before the first mini-batch, in the compiled files of October 2025. The source of January 2026 has
-- (1 - p) without the square, in a variable still named x_one_minus_x_squared: omega_unsquared. The equation of the
-- paper could not be read.
create macro omega_law(logprob, entropy, advantage) as -advantage * pow(1 - exp(logprob), 2) * (entropy + logprob);
create macro omega_unsquared_law(logprob, entropy, advantage) as (
  -advantage * (1 - exp(logprob)) * (entropy + logprob)
);

-- -sign(A) for p > 1/2, and sign(A) otherwise (arXiv 2509.20712, CE-GPPO): positive and likely or negative and unlikely
-- tokens lose entropy, the other two kinds gain it. Neither the abstract nor the released code, which acts on clipped
-- tokens only, defines a likely token; 1/2 is our choice.
create macro quadrant_law(logprob, advantage) as -sign(advantage) * if(logprob > ln(0.5), 1, -1);

-- -ln p / (H + 1e-6) (arXiv 2606.31575, relative surprisal index); a filter of tokens that makes no use of A. The
-- equation is from a third party's implementation; the paper's own code was not found.
create macro relative_surprisal(logprob, entropy) as -logprob / (entropy + 1e-6);

-- ln of (H after + 1e-8) / (H + 1e-8) (arXiv 2512.05591, released code of ERC); known only after the update.
create macro log_entropy_ratio(entropy, entropy_after) as ln((entropy_after + 1e-8) / (entropy + 1e-8));

-- A (1 - 2 p + sum p^2) |h|^2, from the recorded gradient norm: the change of the token's log-probability by a gradient
-- step of the LM head on this token alone.
create macro own_gradient(grad_norm, advantage) as if(advantage = 0, 0, grad_norm * grad_norm / advantage);

-- Half-nat bins of the log-odds of p, and of ln H.
create macro log_odds(logprob) as logprob - ln(greatest(1 - exp(logprob), 1e-12));
create macro odds_bin(logprob) as floor(2 * greatest(-40, least(40, log_odds(logprob))))::integer;
create macro entropy_bin(entropy) as floor(2 * ln(greatest(entropy, 1e-6)))::integer;

-- By how much did the update change entropy and log-probability of each token?
-- One row per token in the update with both after-update values: the columns of moved_tokens, loss_advantage (the
-- advantage in the loss), and dentropy and dlogprob in nats.
create view entropy_changes as
select
  *,
  coalesce(shaped_advantage, advantage)::double as loss_advantage,
  entropy_after::double - entropy as dentropy,
  logprob_after::double - logprob as dlogprob
from moved_tokens
where entropy is not null and entropy_after is not null and coalesce(shaped_advantage, advantage) is not null;

-- What are the means over the tokens of an update, and how much did the entropy of each category of tokens change?
-- One row per run, step, and category with tokens in the update: the step's mean log-probability, advantage in the
-- loss, and discriminator (over all its tokens in the update), and the category's mean dentropy at all other steps of
-- the run. These rows are kept while the runs are open.
create view update_batches as
with changed as (
  select
    run_id,
    step,
    category,
    count(*) as tokens,
    sum(logprob::double) as logprobs,
    sum(coalesce(shaped_advantage, advantage)::double) as advantages,
    count(coalesce(shaped_advantage, advantage)) as num_advantages,
    sum(discriminator(logprob::double, entropy::double)) as discriminators,
    sum(entropy_after::double - entropy) filter (where is_changed) as change,
    count(*) filter (where is_changed) as num_changed
  from (
    select
      *,
      logprob_after is not null and entropy_after is not null and coalesce(shaped_advantage, advantage) is not null
        as is_changed
    from tokens
    where is_kept and logprob is not null and entropy is not null
  )
  group by all
),
totals as (
  select
    *,
    sum(tokens) over of_step as all_tokens,
    sum(logprobs) over of_step as all_logprobs,
    sum(advantages) over of_step as all_advantages,
    sum(num_advantages) over of_step as all_num_advantages,
    sum(discriminators) over of_step as all_discriminators,
    sum(change) over of_category as category_change,
    sum(num_changed) over of_category as category_num_changed
  from changed
  window of_step as (partition by run_id, step), of_category as (partition by run_id, category)
)
select
  run_id,
  step,
  category,
  all_logprobs / all_tokens as logprob_mean,
  all_advantages / all_num_advantages as advantage_mean,
  all_discriminators / all_tokens as discriminator_mean,
  (category_change - coalesce(change, 0)) / nullif(category_num_changed - num_changed, 0) as change_at_other_steps
from totals;

-- What does each formula predict for an update as a whole?
-- One row per run and step with tokens in the update that have an advantage: the mean of each formula over these
-- tokens, and update_size, the mean of |A|. These rows are kept while the runs are open.
create view update_predictions as
select
  run_id,
  step,
  -- The mean of covariance_law over the update.
  -covar_pop(logprob, loss_advantage) as covariance,
  avg(discriminator_law(logprob, entropy, loss_advantage)) as discriminator,
  avg(first_order_law(logprob, entropy, loss_advantage, sum_p2_others, sum_p2_logp_others)) as first_order,
  avg(omega_law(logprob, entropy, loss_advantage)) as omega,
  avg(quadrant_law(logprob, loss_advantage)::double) as quadrants,
  avg(abs(loss_advantage)) as update_size
from (
  select
    run_id,
    step,
    logprob::double as logprob,
    entropy::double as entropy,
    sum_p2_others::double as sum_p2_others,
    sum_p2_logp_others::double as sum_p2_logp_others,
    coalesce(shaped_advantage, advantage)::double as loss_advantage
  from tokens
  where
    is_kept
    and logprob is not null
    and entropy is not null
    and coalesce(shaped_advantage, advantage) is not null
)
group by all;

-- What does each formula predict for each token, and what do plain properties of the token?
-- One row per token of entropy_changes: a column per predictor, dentropy, dlogprob, sign of the advantage,
-- odds_bin, and entropy_bin. category is the mean dentropy of the token's category at all other steps.
create view entropy_predictions as
select
  changed.run_id,
  changed.step,
  changed.prompt_id,
  dentropy,
  dlogprob,
  sign(loss_advantage)::integer as sign,
  odds_bin(logprob::double) as odds_bin,
  entropy_bin(entropy::double) as entropy_bin,
  covariance_law(logprob::double, loss_advantage, logprob_mean, advantage_mean) as covariance,
  discriminator_law(logprob::double, entropy::double, loss_advantage) as discriminator,
  centered_discriminator_law(logprob::double, entropy::double, loss_advantage, discriminator_mean)
    as centered_discriminator,
  first_order_law(
    logprob::double, entropy::double, loss_advantage, sum_p2_others::double, sum_p2_logp_others::double
  ) as first_order,
  omega_law(logprob::double, entropy::double, loss_advantage) as omega,
  omega_unsquared_law(logprob::double, entropy::double, loss_advantage) as omega_unsquared,
  quadrant_law(logprob::double, loss_advantage)::double as quadrants,
  own_gradient(grad_norm::double, loss_advantage)::double as own_gradient,
  relative_surprisal(logprob::double, entropy::double) as relative_surprisal,
  log_entropy_ratio(entropy::double, entropy_after::double) as entropy_ratio,
  entropy::double as entropy,
  exp(logprob::double) as probability,
  changed.position / changed.response_length as position,
  batches.change_at_other_steps as category
from entropy_changes as changed
join update_batches as batches
  on batches.run_id = changed.run_id and batches.step = changed.step
  and batches.category is not distinct from changed.category;

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
-- Sums and means over the tokens of a step, from compared_sums of its prompts.
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
-- The rank within a step; equal values share the mean of their ranks.
create macro mean_rank(value, run_id, step) as (
  if(
    value is null,
    null,
    rank() over (partition by run_id, step order by value) + count(*) over (partition by run_id, step, value) / 2
  )
);

-- How far do the predicted and the measured change of tokens deviate from those of comparable tokens?
-- One row per run, step, prompt, and comparison, for target 'entropy' or 'logprob', and scale 'value' or 'rank' (within
-- the step): a column per predictor with the sums of paired_sums, and own_gradient_of_logprob, whose target is always
-- 'logprob'. Comparison 'overall': tokens of the step. 'shuffle': of equal step, sign of the advantage, and probability;
-- a shuffle of the changes of these tokens leaves no correlation of x and y on average. 'random': of equal step,
-- probability, and entropy; a random update, which depends on these and not on the advantage, leaves no correlation.
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
      comparable_means(first_order_change, first_order_tokens, run_id, step, sign, odds_bin, entropy_bin) as first_order_change,
      comparable_means(own_gradient_change, own_gradient_tokens, run_id, step, sign, odds_bin, entropy_bin) as own_gradient_change,
      comparable_means(own_gradient_dlogprob, own_gradient_tokens, run_id, step, sign, odds_bin, entropy_bin) as own_gradient_dlogprob,
      comparable_means(category_change, category_tokens, run_id, step, sign, odds_bin, entropy_bin) as category_change,
      comparable_means(covariance, tokens, run_id, step, sign, odds_bin, entropy_bin) as covariance,
      comparable_means(discriminator, tokens, run_id, step, sign, odds_bin, entropy_bin) as discriminator,
      comparable_means(centered_discriminator, tokens, run_id, step, sign, odds_bin, entropy_bin) as centered_discriminator,
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
    comparison,
    compared_sums(comparison, by_prompt.covariance) as covariance,
    compared_sums(comparison, by_prompt.discriminator) as discriminator,
    compared_sums(comparison, by_prompt.centered_discriminator) as centered_discriminator,
    compared_sums(comparison, by_prompt.first_order) as first_order,
    compared_sums(comparison, by_prompt.omega) as omega,
    compared_sums(comparison, by_prompt.omega_unsquared) as omega_unsquared,
    compared_sums(comparison, by_prompt.quadrants) as quadrants,
    compared_sums(comparison, by_prompt.own_gradient) as own_gradient,
    compared_sums(comparison, by_prompt.relative_surprisal) as relative_surprisal,
    compared_sums(comparison, by_prompt.entropy_ratio) as entropy_ratio,
    compared_sums(comparison, by_prompt.entropy) as entropy,
    compared_sums(comparison, by_prompt.probability) as probability,
    compared_sums(comparison, by_prompt.position) as position,
    compared_sums(comparison, by_prompt.category) as category,
    compared_sums(comparison, by_prompt.own_gradient_of_logprob) as own_gradient_of_logprob
  from by_prompt
  join staged_steps on staged_steps.run_id = by_prompt.run_id and staged_steps.step = by_prompt.step
  cross join (values ('overall'), ('shuffle'), ('random')) as comparisons (comparison);

-- Sums of law_sums_by_prompt for the change of entropy, without ranks. These rows are kept while the runs are open.
create view entropy_law_sums as
select *
from law_sums_by_prompt('entropy', 'value');
