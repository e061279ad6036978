-- question: T1. How does entropy in the first and last fifth of a response compare with its middle, in the plateau?
-- grain: one row per run, step and prompt, over responses in the update of at least five tokens
-- params: $runs list of run_id, null = all
-- units: first_sum, middle_sum, last_sum = sums over responses of the mean entropy of that part, nats per token
-- needs: tokens
with fifths as (
  select run_id, step, rollout_id, prompt_id, entropy, floor(relative_position * 5)::integer as fifth
  from staged_tokens
  where
    stage = 'plateau'
    and sample_sign is not null
    and response_length >= 5
    and ($runs is null or list_contains($runs, run_id))
),
per_response as (
  select
    run_id,
    step,
    rollout_id,
    prompt_id,
    avg(entropy) filter (where fifth = 0) as first_mean,
    avg(entropy) filter (where fifth between 1 and 3) as middle_mean,
    avg(entropy) filter (where fifth = 4) as last_mean
  from fifths
  group by all
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
