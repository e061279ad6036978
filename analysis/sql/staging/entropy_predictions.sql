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
