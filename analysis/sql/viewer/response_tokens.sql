-- Which tokens does one response have, and what was measured of each?
-- One row per token of the response, context included, in order. Replacements of a token by `entrace intervene` are
-- averaged. dp and dentropy are changes by the step's update; mismatch is trainer minus engine.
with
replaced as (
  select position, avg(impact) as impact, sum(num_continuations)::bigint as num_continuations
  from interventions
  where run_id = $run and rollout_id = $rollout
  group by position
),
own as (
  select *
  from response_tokens
  where run_id = $run and rollout_id = $rollout and step = $step
)
select
  own.position,
  own.token_id,
  vocab.text,
  coalesce(vocab.is_special, own.category = 'special', false) as is_special,
  own.category,
  own.entropy,
  own.logprob,
  -own.logprob as surprisal,
  own.advantage,
  own.shaped_advantage,
  own.shaped_advantage - own.advantage as advantage_change,
  own.grad_norm,
  exp(own.logprob_after::double) - exp(own.logprob::double) as dp,
  own.logprob_after - own.logprob as dlogprob,
  own.entropy_after - own.entropy as dentropy,
  replaced.impact,
  replaced.num_continuations,
  own.sampling_logprob,
  own.logprob - own.sampling_logprob as mismatch,
  own.reference_logprob,
  own.logprob - own.reference_logprob as reference_gap,
  own.is_clipped,
  own.loss_mask,
  own.turn,
  own.policy_version
from own
left join vocab on vocab.run_id = $run and vocab.token_id = own.token_id
left join replaced on replaced.position = own.position
order by own.position
