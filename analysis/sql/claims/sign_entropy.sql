-- question: S2. How much entropy do the incorrect and the correct responses of each group have?
-- grain: one row per run, step, and group with responses of both signs in the update
-- params: $runs: list of run_id (default all)
-- units: *_sum in nats: mean entropy of a sign's tokens times the number of tokens of the group; *_mean in nats per
--   token: mean over responses
-- needs: responses, response entropies, advantages
with per_group as (
  select
    run_id,
    step,
    group_id,
    any_value(prompt_id) as prompt_id,
    sum(generated_length) as tokens,
    sum(entropy_mean::double * generated_length) filter (where sample_sign = 'negative')
    / sum(generated_length) filter (where sample_sign = 'negative') as negative,
    sum(entropy_mean::double * generated_length) filter (where sample_sign = 'positive')
    / sum(generated_length) filter (where sample_sign = 'positive') as positive,
    avg(entropy_mean) filter (where sample_sign = 'negative') as negative_mean,
    avg(entropy_mean) filter (where sample_sign = 'positive') as positive_mean
  from staged_responses
  where
    sample_sign is not null
    and entropy_mean is not null
    and ($runs is null or list_contains($runs, run_id))
  group by run_id, step, group_id
),
-- Both signs have the weight of their group, so differences between groups cancel.
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
