-- Which tokens does one response have, and what was measured of each?
-- One row per token of the response, context included, in order: columns of measured_tokens.sql, which the caller
-- defines as "measured". Replacements of a token by `entrace intervene` are averaged.
with replaced as (
  select position, avg(impact) as impact, sum(num_continuations)::bigint as num_continuations
  from interventions
  where run_id = $run and rollout_id = $rollout
  group by position
)
select
  measured.position,
  measured.token_id,
  vocab.text,
  coalesce(vocab.is_special, measured.category = 'special', false) as is_special,
  measured.category,
  measured.entropy,
  measured.logprob,
  measured.surprisal,
  measured.advantage,
  measured.shaped_advantage,
  measured.advantage_change,
  measured.grad_norm,
  measured.dp,
  measured.dlogprob,
  measured.dentropy,
  replaced.impact,
  replaced.num_continuations,
  measured.sampling_logprob,
  measured.mismatch,
  measured.reference_logprob,
  measured.reference_gap,
  measured.is_clipped,
  measured.loss_mask,
  measured.turn,
  measured.policy_version
from measured
left join vocab on vocab.run_id = $run and vocab.token_id = measured.token_id
left join replaced on replaced.position = measured.position
where measured.run_id = $run and measured.rollout_id = $rollout and measured.step = $step
order by measured.position
