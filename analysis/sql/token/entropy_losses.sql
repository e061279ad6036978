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
    stage,
    step,
    prompt_id,
    sample_sign,
    dentropy,
    case
      when logprob < ln(0.1) then 'p < .1'
      when logprob < ln(0.5) then 'p .1 to .5'
      when logprob < ln(0.9) then 'p .5 to .9'
      when logprob < ln(0.99) then 'p .9 to .99'
      else 'p > .99'
    end as probability,
    coalesce(category, 'unknown') as category,
    'fifth ' || (1 + floor(5 * relative_position)::integer) as position
  from staged_entropy_changes
  where
    sample_sign is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
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
    sum(dentropy) as change,
    count(*) as in_bin
  from changed
  group by
    run_id,
    stage,
    sample_sign,
    step,
    prompt_id,
    grouping sets ((probability), (category), (position))
),
prompts as (
  select run_id, stage, step, prompt_id, count(*) as tokens
  from changed
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
