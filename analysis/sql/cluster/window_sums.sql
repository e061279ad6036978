-- question: S2, S4. What did each prompt contribute to entropy and defects at the start and at the end of the rising stage?
-- grain: one row per run, prompt, window and sample sign ('none' = not in the update)
-- params: $runs list of run_id, null = all
-- units: entropy_sum in nats; num_tokens in tokens; num_responses, num_defective in responses
-- needs: responses
with responses as (
  select *
  from staged_responses
  where "window" is not null and ($runs is null or list_contains($runs, run_id))
),
final as (
  select
    run_id,
    prompt_id,
    "window",
    coalesce(sample_sign, 'none') as sample_sign,
    sum(entropy_mean::double * response_length) as entropy_sum,
    sum(response_length)::bigint as num_tokens,
    count(*) as num_responses,
    count(*) filter (where len(defects) > 0) as num_defective
  from responses
  group by all
  order by all
)
select * from final
