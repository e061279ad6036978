-- question: I1. Among the responses to one prompt, are low-perplexity responses more often correct?
-- grain: one row per run, stage, and bin of length-adjusted perplexity (1 = lowest), over groups with correct and
--   incorrect responses
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $bins: integer in [1, 1000],
--   bins of perplexity per group (default 4)
-- units: accuracy, low, high in [0, 1] (95% interval over steps and prompts); ppl_mean is a perplexity (>= 1); num_*
--   are counts
-- needs: responses, perplexities, correctness
with responses as (
  select run_id, stage, step, prompt_id, group_id, sample_index, is_correct, ppl, surprisal_at_length
  from responses_at_length
  where
    is_correct is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
mixed_groups as (
  select run_id, group_id
  from responses
  group by all
  having bool_or(is_correct) and not bool_and(is_correct)
),
mixed as (
  select
    *,
    ntile(coalesce($bins, 4)::integer) over (
      partition by run_id, group_id order by surprisal_at_length, sample_index
    ) as ppl_bin
  from responses
  semi join mixed_groups using (run_id, group_id)
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
    count(*) as responses
  from mixed
  group by all
),
per_bin as (
  select
    run_id,
    stage,
    ppl_bin,
    estimate_share(list(step_prompt(step, prompt_id, correct, responses))) as accuracy,
    sum(ppl_sum) / sum(responses) as ppl_mean,
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
    num_responses,
    num_prompts
  from per_bin
  order by run_id, stage desc, ppl_bin
)
select * from final
