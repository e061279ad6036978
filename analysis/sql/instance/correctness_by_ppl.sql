-- question: I1. Within the responses to one prompt, are those of low perplexity more often right?
-- grain: one row per run, stage and perplexity bin (1 = lowest), over groups that hold right and wrong responses
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both; $bins per group, null = 4
-- units: accuracy, low, high in [0, 1] (95 % interval, clustered by prompt); ppl_mean is a perplexity, >= 1
-- needs: responses
with responses as (
  select run_id, step, stage, prompt_id, sample_index, is_correct, ppl
  from staged_responses
  where
    ppl is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
mixed_groups as (
  select run_id, step, prompt_id
  from responses
  group by all
  having bool_or(is_correct) and not bool_and(is_correct)
),
mixed as (
  select
    *,
    ntile(coalesce($bins, 4)::integer) over (
      partition by run_id, step, prompt_id order by ppl, sample_index
    ) as ppl_bin
  from responses
  semi join mixed_groups using (run_id, step, prompt_id)
),
per_prompt as (
  select
    run_id,
    stage,
    ppl_bin,
    prompt_id,
    sum(is_correct::integer) as correct,
    sum(ppl) as ppl_sum,
    count(*) as responses
  from mixed
  group by all
),
final as (
  select
    run_id,
    stage,
    ppl_bin,
    clustered_mean(correct, responses) as accuracy,
    as_share(clustered_low(correct, responses)) as low,
    as_share(clustered_high(correct, responses)) as high,
    clustered_mean(ppl_sum, responses) as ppl_mean,
    sum(responses)::bigint as num_responses,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, stage desc, ppl_bin
)
select * from final
