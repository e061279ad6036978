-- Mean entropy of the first fifth, the three middle fifths and the last fifth of each response in the update of five
-- tokens or more. Tokens are averaged before a query joins steps: joining each of them would take most of the time.
create view response_fifths as
select
  run_id,
  step,
  rollout_id,
  any_value(prompt_id) as prompt_id,
  if(any_value(advantage) = 0, null, if(any_value(advantage) > 0, 'positive', 'negative')) as sample_sign,
  avg(entropy) filter (where position * 5 < response_length) as first_mean,
  avg(entropy) filter (where position * 5 >= response_length and position * 5 < 4 * response_length) as middle_mean,
  avg(entropy) filter (where position * 5 >= 4 * response_length) as last_mean
from tokens
where is_kept and response_length >= 5
group by run_id, step, rollout_id;
