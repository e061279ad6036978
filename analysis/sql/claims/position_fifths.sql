-- question: T1. In the plateau, how does entropy in the first and last fifth of a response compare with its middle?
-- grain: one row per run, step, and prompt, over responses of five or more tokens in the update
-- params: $runs: list of run_id (default all)
-- units: first_sum, middle_sum, last_sum: sums over responses of the mean entropy of that part, by token_weight, in
--   nats per token; num_responses: responses, by token_weight
-- needs: tokens, entropies
with per_response as (
  select response_fifths.*, token_steps.token_weight
  from response_fifths
  join token_steps on token_steps.run_id = response_fifths.run_id and token_steps.step = response_fifths.step
  where token_steps.stage = 'plateau' and ($runs is null or list_contains($runs, response_fifths.run_id))
),
final as (
  select
    run_id,
    step,
    prompt_id,
    sum(first_mean * token_weight) as first_sum,
    sum(middle_mean * token_weight) as middle_sum,
    sum(last_mean * token_weight) as last_sum,
    sum(token_weight) as num_responses
  from per_response
  group by all
  order by all
)
select * from final
