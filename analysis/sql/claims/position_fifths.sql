-- question: T1. In the plateau, how does entropy in the first and last fifth of a response compare with its middle?
-- grain: one row per run, step, and prompt, over responses of five or more tokens in the update
-- params: $runs: list of run_id (default all)
-- units: first_sum, middle_sum, last_sum: sums over responses of the mean entropy of that part, in nats per token;
--   num_responses in responses
-- needs: tokens
with per_response as (
  select response_fifths.*
  from response_fifths
  join staged_steps on staged_steps.run_id = response_fifths.run_id and staged_steps.step = response_fifths.step
  where staged_steps.stage = 'plateau' and ($runs is null or list_contains($runs, response_fifths.run_id))
),
final as (
  select
    run_id,
    step,
    prompt_id,
    sum(first_mean) as first_sum,
    sum(middle_mean) as middle_sum,
    sum(last_mean) as last_sum,
    count(*) as num_responses
  from per_response
  group by all
  order by all
)
select * from final
