-- question: S2. How much entropy do the wrong and the right responses of each group have?
-- grain: one row per run, step and group that holds responses of either sign, in the update
-- params: $runs list of run_id, null = all
-- units: *_sum = mean entropy of a sign's tokens times the tokens of the group; *_mean = mean over responses; nats
-- needs: responses
with per_group as (
  select
    run_id,
    step,
    group_id,
    any_value(prompt_id) as prompt_id,
    sum(response_length) as tokens,
    sum(entropy_mean::double * response_length) filter (where sample_sign = 'negative')
      / sum(response_length) filter (where sample_sign = 'negative') as negative,
    sum(entropy_mean::double * response_length) filter (where sample_sign = 'positive')
      / sum(response_length) filter (where sample_sign = 'positive') as positive,
    avg(entropy_mean) filter (where sample_sign = 'negative') as negative_mean,
    avg(entropy_mean) filter (where sample_sign = 'positive') as positive_mean
  from staged_responses
  where
    sample_sign is not null
    and entropy_mean is not null
    and ($runs is null or list_contains($runs, run_id))
  group by run_id, step, group_id
),
-- Both signs get the weight of their group: what a group is like cannot enter the comparison.
final as (
  select
    run_id,
    step,
    prompt_id,
    tokens * negative as negative_sum,
    tokens * positive as positive_sum,
    negative_mean,
    positive_mean
  from per_group
  where negative is not null and positive is not null
  order by run_id, step, group_id
)
select * from final
