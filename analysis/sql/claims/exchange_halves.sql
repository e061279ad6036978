-- question: E1. What are the entropy and accuracy of each step, measured on two halves of its prompts?
-- grain: one row per run, step, and half (0, 1) of the step's prompts, over all sampled responses
-- params: $runs: list of run_id (default all)
-- units: entropy_sum in nats; tokens in tokens; correct, responses in responses
-- needs: responses, response entropies, correctness
with halves as (
  select
    *,
    dense_rank() over (partition by run_id, step order by prompt_id) % 2 as half
  from rollouts
  where
    entropy_mean is not null
    and is_correct is not null
    and ($runs is null or list_contains($runs, run_id))
),
final as (
  select
    run_id,
    step,
    half,
    sum(entropy_mean::double * generated_length) as entropy_sum,
    sum(generated_length)::double as tokens,
    sum(is_correct::integer)::double as correct,
    count(*)::double as responses
  from halves
  group by all
  order by all
)
select * from final
