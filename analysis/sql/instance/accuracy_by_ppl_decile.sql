-- question: I1. Over all prompts together, are low-perplexity responses more often correct?
-- grain: one row per run, stage, and perplexity bin (1 = lowest), over all sampled responses to easy and hard prompts
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $bins: integer in [1, 1000],
--   bins of perplexity (default 10)
-- units: accuracy, low, high in [0, 1] (95% interval over steps and prompts); ppl_mean, ppl_low, ppl_high are
--   perplexities (>= 1); num_* are counts
-- needs: responses, perplexities, correctness
with responses as (
  select
    run_id,
    stage,
    step,
    prompt_id,
    is_correct,
    ppl,
    ntile(coalesce($bins, 10)::integer) over (partition by run_id, stage order by ppl, rollout_id) as ppl_bin
  from staged_responses
  where
    ppl is not null
    and is_correct is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
per_prompt as (
  select
    run_id,
    stage,
    ppl_bin,
    step,
    prompt_id,
    sum(is_correct::integer) as correct,
    sum(ppl) as ppl_sum,
    min(ppl) as ppl_low,
    max(ppl) as ppl_high,
    count(*) as responses
  from responses
  group by all
),
per_bin as (
  select
    run_id,
    stage,
    ppl_bin,
    estimate_share(list(step_prompt(step, prompt_id, correct, responses))) as accuracy,
    sum(ppl_sum) / sum(responses) as ppl_mean,
    min(ppl_low) as ppl_low,
    max(ppl_high) as ppl_high,
    sum(responses)::bigint as num_responses,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    ppl_bin,
    accuracy.value as accuracy,
    accuracy.low as low,
    accuracy.high as high,
    ppl_mean,
    ppl_low,
    ppl_high,
    num_responses,
    num_prompts
  from per_bin
  order by run_id, stage desc, ppl_bin
)
select * from final
