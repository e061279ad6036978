-- What is usual at each relative position of the responses of one run and stage?
-- One row per twentieth of a response: mean, first and last decile, and number of tokens. $quantity is one of the
-- measured columns of response_tokens.sql.
select
  least(floor(20 * relative_position), 19)::integer as bin,
  avg(quantity) as mean,
  quantile_cont(quantity, 0.1) as low,
  quantile_cont(quantity, 0.9) as high,
  count(*) as num_tokens
from (
  select
    relative_position,
    case $quantity
      when 'entropy' then entropy
      when 'logprob' then logprob
      when 'surprisal' then -logprob
      when 'advantage' then advantage
      when 'shaped_advantage' then shaped_advantage
      when 'advantage_change' then shaped_advantage - advantage
      when 'grad_norm' then grad_norm
      when 'dp' then exp(logprob_after::double) - exp(logprob::double)
      when 'dlogprob' then logprob_after - logprob
      when 'dentropy' then entropy_after - entropy
      when 'mismatch' then logprob - sampling_logprob
      when 'reference_gap' then logprob - reference_logprob
    end as quantity
  from staged_tokens
  where run_id = $run and stage = $stage
)
where quantity is not null
group by bin
order by bin
