-- question: T1. Is entropy higher at both ends of a response than in its middle (U shape), by stage and sign?
-- grain: one row per run, stage, sample sign and part; responses in the update of five tokens or more, weighted alike
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both
-- units: excess, low, high = entropy of the part / that of the middle - 1 (95 % interval, clustered by prompt)
-- needs: tokens
with
-- Tokens are averaged by response before they meet their stage: joining each of them would take most of the time.
fifths as (
  select
    run_id,
    step,
    rollout_id,
    any_value(prompt_id) as prompt_id,
    if(any_value(advantage) > 0, 'positive', 'negative') as sample_sign,
    avg(entropy) filter (where position * 5 < response_length) as first_mean,
    avg(entropy) filter (where position * 5 >= response_length and position * 5 < 4 * response_length) as middle_mean,
    avg(entropy) filter (where position * 5 >= 4 * response_length) as last_mean
  from tokens
  where advantage <> 0 and response_length >= 5 and ($runs is null or list_contains($runs, run_id))
  group by run_id, step, rollout_id
),
per_response as (
  select fifths.*, staged_steps.stage
  from fifths
  join staged_steps on staged_steps.run_id = fifths.run_id and staged_steps.step = fifths.step
  where $stage is null or staged_steps.stage = $stage
),
-- 'beginning' = first fifth, 'end' = last; the middle = the three fifths between.
parts as (
  select unnest(['beginning', 'end']) as part
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    part,
    prompt_id,
    sum(if(part = 'beginning', first_mean, last_mean)) as part_sum,
    sum(middle_mean) as middle_sum,
    count(*) as responses
  from per_response, parts
  group by all
),
per_part as (
  select
    run_id,
    stage,
    sample_sign,
    part,
    clustered_mean(part_sum, middle_sum) - 1 as excess,
    clustered_low(part_sum, middle_sum) - 1 as low,
    clustered_high(part_sum, middle_sum) - 1 as high,
    sum(responses)::bigint as num_responses,
    count(*) as num_prompts
  from per_prompt
  group by all
),
-- Both ends have to be higher, so that two tests at once need no correction (intersection-union test).
final as (
  select *, bool_and(coalesce(low > 0, false)) over (partition by run_id, stage, sample_sign) as has_u_shape
  from per_part
  order by run_id, stage desc, sample_sign, part
)
select * from final
