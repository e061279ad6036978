-- What is the entropy at the beginning, in the middle, and at the end of each response?
-- One row per run and response of five or more tokens in the update. first_mean, middle_mean, and last_mean are the
-- mean entropies of the first fifth, the three middle fifths, and the last fifth, in nats per token.
create view response_fifths as
select
  run_id,
  step,
  rollout_id,
  any_value(prompt_id) as prompt_id,
  sign_of(true, any_value(advantage)) as sample_sign,
  avg(entropy) filter (where position * 5 < response_length) as first_mean,
  avg(entropy) filter (where position * 5 >= response_length and position * 5 < 4 * response_length) as middle_mean,
  avg(entropy) filter (where position * 5 >= 4 * response_length) as last_mean
from tokens
where is_kept and response_length >= 5
group by run_id, step, rollout_id;

-- The same, summed over the responses to a prompt whose advantages have one sign.
-- One row per run, step, prompt, and sample_sign: first_sum, middle_sum, and last_sum are sums of the means, and
-- num_responses counts the responses. These rows are kept while the runs are open.
create view fifths_by_prompt as
select
  run_id,
  step,
  prompt_id,
  sample_sign,
  sum(first_mean) as first_sum,
  sum(middle_mean) as middle_sum,
  sum(last_mean) as last_sum,
  count(*) as num_responses
from response_fifths
group by all;
