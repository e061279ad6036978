-- question: T1. How does entropy in the first and last fifth of a response compare with its middle, in the plateau?
-- grain: one row per run, step and prompt, over responses in the update of at least five tokens
-- params: $runs list of run_id, null = all
-- units: first_sum, middle_sum, last_sum = sums over responses of the mean entropy of that part, nats per token
-- needs: tokens
with per_response as (
  select
    run_id,
    step,
    rollout_id,
    any_value(prompt_id) as prompt_id,
    avg(entropy) filter (where position * 5 < response_length) as first_mean,
    avg(entropy) filter (where position * 5 >= response_length and position * 5 < 4 * response_length) as middle_mean,
    avg(entropy) filter (where position * 5 >= 4 * response_length) as last_mean
  from tokens
  where advantage <> 0 and response_length >= 5 and ($runs is null or list_contains($runs, run_id))
  group by run_id, step, rollout_id
),
final as (
  select
    per_response.run_id,
    per_response.step,
    prompt_id,
    sum(first_mean) as first_sum,
    sum(middle_mean) as middle_sum,
    sum(last_mean) as last_sum,
    count(*) as num_responses
  from per_response
  join staged_steps on staged_steps.run_id = per_response.run_id and staged_steps.step = per_response.step
  where staged_steps.stage = 'plateau'
  group by all
  order by all
)
select * from final
