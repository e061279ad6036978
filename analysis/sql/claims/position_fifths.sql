-- question: T1. In the plateau, how does entropy in the first and last fifth of a response compare with its middle?
-- grain: one row per run, step, and prompt, over responses of five or more tokens in the update
-- params: $runs: list of run_id (default all)
-- units: first_sum, middle_sum, last_sum: sums over responses of the mean entropy of that part, by token_weight, in
--   nats per token; num_responses: responses, by token_weight
-- needs: tokens, entropies
with final as (
  select
    fifths_by_prompt.run_id,
    fifths_by_prompt.step,
    prompt_id,
    sum(first_sum * token_weight) as first_sum,
    sum(middle_sum * token_weight) as middle_sum,
    sum(last_sum * token_weight) as last_sum,
    sum(num_responses * token_weight) as num_responses
  from fifths_by_prompt
  join token_steps on token_steps.run_id = fifths_by_prompt.run_id and token_steps.step = fifths_by_prompt.step
  where token_steps.stage = 'plateau' and ($runs is null or list_contains($runs, fifths_by_prompt.run_id))
  group by fifths_by_prompt.run_id, fifths_by_prompt.step, prompt_id
  order by all
)
select * from final
