-- question: I1. Over the responses to all prompts together, are those of low perplexity more often right?
-- grain: one row per run, stage and perplexity bin (1 = lowest), over all sampled responses to easy and hard prompts
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both; $bins of perplexity, null = 10
-- units: accuracy, low, high in [0, 1] (95 % interval, clustered by prompt); ppl_* are perplexities, >= 1
-- needs: responses
with responses as (
  select
    run_id,
    stage,
    prompt_id,
    is_correct,
    ppl,
    ntile(coalesce($bins, 10)::integer) over (partition by run_id, stage order by ppl, rollout_id) as ppl_bin
  from staged_responses
  where
    ppl is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
per_prompt as (
  select
    run_id,
    stage,
    ppl_bin,
    prompt_id,
    sum(is_correct::integer) as correct,
    sum(ppl) as ppl_sum,
    min(ppl) as ppl_low,
    max(ppl) as ppl_high,
    count(*) as responses
  from responses
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
    min(ppl_low) as ppl_low,
    max(ppl_high) as ppl_high,
    sum(responses)::bigint as num_responses,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, stage desc, ppl_bin
)
select * from final
