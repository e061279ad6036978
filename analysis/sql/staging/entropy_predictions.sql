-- Published formulas for the change of entropy at a token by an update. Each value is the predicted change up to a
-- common factor, the step size: positive if entropy is predicted to rise. With p the probability of the sampled token,
-- H the entropy, and A the advantage in the loss, a gradient step on the logits of one token alone,
-- dz_v = A ([v = token] - p_v), changes the entropy to first order by -A (p (H + ln p) - sum_v p_v^2 (H + ln p_v)).
-- No trace holds the sum over the vocabulary. Entropy polarity (arXiv 2605.11775), which its abstract describes as this
-- sum with a sampled and a distributional part, is therefore missing here; its equation could not be verified.

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

-- -A (1 - p)^2 (H + ln p) (arXiv 2510.10150, Omega of STEER). The released code has A / p_old * p (1 - p)^2 (H + ln p),
-- which is equal before the first mini-batch. Its first release had (1 - p) without the square: omega_first_release.
create macro omega_law(logprob, entropy, advantage) as -advantage * pow(1 - exp(logprob), 2) * (entropy + logprob);
create macro omega_first_release_law(logprob, entropy, advantage) as (
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
-- One row per token in the update with both after-update values: the columns of staged_movements, loss_advantage (the
-- advantage in the loss), dentropy and dlogprob in nats, and *_mean over all tokens of the step's update.
create view staged_entropy_changes as
with batches as (
  select
    run_id,
    step,
    avg(logprob::double order by logprob) as logprob_mean,
    avg(coalesce(shaped_advantage, advantage)::double order by coalesce(shaped_advantage, advantage)) as advantage_mean,
    avg(discriminator(logprob::double, entropy::double) order by logprob, entropy) as discriminator_mean
  from tokens
  where is_kept and logprob is not null and entropy is not null
  group by all
)
select
  moved.*,
  coalesce(moved.shaped_advantage, moved.advantage)::double as loss_advantage,
  moved.entropy_after::double - moved.entropy as dentropy,
  moved.logprob_after::double - moved.logprob as dlogprob,
  batches.logprob_mean,
  batches.advantage_mean,
  batches.discriminator_mean
from staged_movements as moved
join batches on batches.run_id = moved.run_id and batches.step = moved.step
where
  moved.entropy is not null
  and moved.entropy_after is not null
  and coalesce(moved.shaped_advantage, moved.advantage) is not null;

-- What does each formula predict for each token, and what do plain properties of the token?
-- One row per token of staged_entropy_changes and predictor: prediction, dentropy, dlogprob, sign of the advantage,
-- odds_bin, and entropy_bin. category is the mean dentropy of the token's category at all other steps.
create view entropy_predictions as
with predicted as (
  select
    run_id,
    stage,
    step,
    prompt_id,
    dentropy,
    dlogprob,
    sign(loss_advantage)::integer as sign,
    odds_bin(logprob::double) as odds_bin,
    entropy_bin(entropy::double) as entropy_bin,
    covariance_law(logprob::double, loss_advantage, logprob_mean, advantage_mean) as covariance,
    discriminator_law(logprob::double, entropy::double, loss_advantage) as discriminator,
    centered_discriminator_law(logprob::double, entropy::double, loss_advantage, discriminator_mean)
      as centered_discriminator,
    omega_law(logprob::double, entropy::double, loss_advantage) as omega,
    omega_first_release_law(logprob::double, entropy::double, loss_advantage) as omega_first_release,
    quadrant_law(logprob::double, loss_advantage)::double as quadrants,
    own_gradient(grad_norm::double, loss_advantage)::double as own_gradient,
    relative_surprisal(logprob::double, entropy::double) as relative_surprisal,
    log_entropy_ratio(entropy::double, entropy_after::double) as entropy_ratio,
    entropy::double as entropy,
    exp(logprob::double) as probability,
    relative_position as position,
    (sum(dentropy order by dentropy) over categories - sum(dentropy order by dentropy) over own_step)
    / nullif(count(*) over categories - count(*) over own_step, 0) as category
  from staged_entropy_changes
  window categories as (partition by run_id, category), own_step as (partition by run_id, category, step)
)
select
  run_id,
  stage,
  step,
  prompt_id,
  dentropy,
  dlogprob,
  sign,
  odds_bin,
  entropy_bin,
  predictor,
  prediction
from predicted
unpivot (
  prediction for predictor in (
    covariance,
    discriminator,
    centered_discriminator,
    omega,
    omega_first_release,
    quadrants,
    own_gradient,
    relative_surprisal,
    entropy_ratio,
    entropy,
    probability,
    position,
    category
  )
);

-- How far do the predicted and the measured change of a token deviate from those of comparable tokens?
-- One row per token, predictor (of a list; null for all), and comparison, for target 'entropy' or 'logprob', and
-- scale 'value' or 'rank' (within the step): x and y, deviations of prediction and change from their means over
-- comparable tokens, and the prediction. Comparison 'overall': tokens of the step. 'shuffle': of equal step, sign
-- of the advantage, and probability; a shuffle of the changes of these tokens leaves no correlation of x and y on
-- average. 'random': of equal step, probability, and entropy; a random update, which depends on these and not on
-- the advantage, leaves no correlation.
create macro centered_predictions(target, scale, predictors) as table
  with chosen as (
    select
      * exclude (dentropy, dlogprob),
      if(target = 'logprob', dlogprob, dentropy) as change
    from entropy_predictions
    where predictors is null or list_contains(predictors, predictor)
  ),
  scaled as (
    select
      * exclude (prediction, change),
      if(scale = 'rank', rank() over by_prediction + count(*) over equal_prediction / 2, prediction) as prediction,
      if(scale = 'rank', rank() over by_change + count(*) over equal_change / 2, change) as change
    from chosen
    window
      by_prediction as (partition by run_id, step, predictor order by prediction),
      equal_prediction as (partition by run_id, step, predictor, prediction),
      by_change as (partition by run_id, step, predictor order by change),
      equal_change as (partition by run_id, step, predictor, change)
  ),
  centered as (
    select
      *,
      avg(prediction order by prediction) over of_step as step_prediction,
      avg(change order by change) over of_step as step_change,
      avg(prediction order by prediction) over of_cell as cell_prediction,
      avg(change order by change) over of_cell as cell_change,
      avg(prediction order by prediction) over of_state as state_prediction,
      avg(change order by change) over of_state as state_change
    from scaled
    window
      of_step as (partition by run_id, step, predictor),
      of_cell as (partition by run_id, step, predictor, sign, odds_bin),
      of_state as (partition by run_id, step, predictor, odds_bin, entropy_bin)
  )
  select
    run_id,
    stage,
    step,
    prompt_id,
    predictor,
    compared.comparison,
    prediction,
    prediction - case compared.comparison
      when 'overall' then step_prediction
      when 'shuffle' then cell_prediction
      else state_prediction
    end as x,
    change - case compared.comparison
      when 'overall' then step_change
      when 'shuffle' then cell_change
      else state_change
    end as y
  from centered
  cross join (values ('overall'), ('shuffle'), ('random')) as compared (comparison);
