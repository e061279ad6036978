-- question: E2. Where do updates lose entropy: by sign of the advantage and probability, category, or position?
-- grain: one row per run, stage, sample sign, breakdown (probability, category, position), and bin, over tokens with
--   after-update values
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: contribution, low, high in nats per token of the stage: sum of changes in the bin over all tokens, so that
--   the bins of a breakdown add up to the mean change (95% interval over steps and prompts); share in [0, 1] of all
--   tokens; num_* are counts
-- needs: after-update values, after-update entropies, log-probabilities, entropies, token advantages
with changed as (
  select
    run_id,
    step,
    prompt_id,
    advantage > 0 as is_positive,
    category,
    bin_of_position(position, response_length, 5) as fifth,
    -- The number of the limits that the probability exceeds.
    (logprob >= ln(0.1))::tinyint
    + (logprob >= ln(0.5))::tinyint
    + (logprob >= ln(0.9))::tinyint
    + (logprob >= ln(0.99))::tinyint as limits_passed,
    sum(dentropy) as change,
    count(*) as tokens
  from entropy_changes
  where advantage <> 0 and ($runs is null or list_contains($runs, run_id))
  group by all
),
staged as (
  select
    changed.run_id,
    staged_steps.stage,
    changed.step,
    changed.prompt_id,
    if(is_positive, 'positive', 'negative') as sample_sign,
    coalesce(category, 'unknown') as category,
    'fifth ' || (1 + fifth) as position,
    ['p < .1', 'p .1 to .5', 'p .5 to .9', 'p .9 to .99', 'p > .99'][1 + limits_passed] as probability,
    change,
    changed.tokens
  from changed
  join staged_steps on staged_steps.run_id = changed.run_id and staged_steps.step = changed.step
  where $stage is null or staged_steps.stage = $stage
),
binned as (
  select
    run_id,
    stage,
    sample_sign,
    case
      when probability is not null then 'probability'
      when category is not null then 'category'
      else 'position'
    end as breakdown,
    coalesce(probability, category, position) as bin,
    step,
    prompt_id,
    sum(change) as change,
    sum(tokens) as in_bin
  from staged
  group by
    run_id,
    stage,
    sample_sign,
    step,
    prompt_id,
    grouping sets ((probability), (category), (position))
),
prompts as (
  select run_id, stage, step, prompt_id, sum(tokens) as tokens
  from staged
  group by all
),
bins as (
  select distinct run_id, stage, sample_sign, breakdown, bin
  from binned
),
-- A prompt without tokens in a bin counts as a change of 0 there.
per_prompt as (
  select
    bins.*,
    prompts.step,
    prompts.prompt_id,
    prompts.tokens,
    coalesce(binned.change, 0) as change,
    coalesce(binned.in_bin, 0) as in_bin
  from bins
  join prompts using (run_id, stage)
  left join binned using (run_id, stage, sample_sign, breakdown, bin, step, prompt_id)
),
per_bin as (
  select
    run_id,
    stage,
    sample_sign,
    breakdown,
    bin,
    estimate(list(step_prompt(step, prompt_id, change, tokens))) as contribution,
    sum(in_bin) / sum(tokens) as share,
    sum(in_bin)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    breakdown,
    bin,
    contribution.value as contribution,
    contribution.low as low,
    contribution.high as high,
    share,
    num_tokens,
    num_prompts
  from per_bin
  order by run_id, stage desc, sample_sign, breakdown, bin
)
select * from final
