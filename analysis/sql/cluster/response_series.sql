-- question: S2, S4. How do entropy of either sign, the gap between them and defects develop from step to step?
-- grain: one row per run and step
-- params: $runs list of run_id, null = all
-- units: *_entropy in nats per token; gap in nats, negative minus positive responses of one prompt; *_share in [0, 1]
-- needs: responses
with responses as (
  select *, entropy_mean::double * response_length as entropy_sum
  from staged_responses
  where $runs is null or list_contains($runs, run_id)
),
per_group as (
  select
    run_id,
    step,
    avg(entropy_mean) filter (where sample_sign = 'negative')
      - avg(entropy_mean) filter (where sample_sign = 'positive') as gap
  from responses
  group by run_id, step, prompt_id
),
gaps as (
  select run_id, step, avg(gap) as gap
  from per_group
  group by all
),
per_step as (
  select
    run_id,
    step,
    sum(entropy_sum) filter (where sample_sign = 'negative')
      / sum(response_length) filter (where sample_sign = 'negative') as negative_entropy,
    sum(entropy_sum) filter (where sample_sign = 'positive')
      / sum(response_length) filter (where sample_sign = 'positive') as positive_entropy,
    coalesce(sum(response_length) filter (where sample_sign = 'negative'), 0)
      / sum(response_length) filter (where sample_sign is not null) as negative_share,
    avg((len(defects) > 0)::integer) as defect_share
  from responses
  group by all
),
final as (
  select per_step.*, gaps.gap
  from per_step
  join gaps using (run_id, step)
  order by run_id, step
)
select * from final
