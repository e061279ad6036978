-- question: S2. Which entropy falls in the rising stage: that of correct (positive) or of incorrect (negative)
--   responses?
-- grain: one row per run, step, and sign of the group-relative advantage, over responses in the update
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: entropy, low, high in nats per token (95% interval over prompts); token_share in [0, 1] of the step's tokens;
--   num_* are counts; boundary_* in steps
-- needs: responses, response entropies, advantages
with responses as (
  select *, entropy_mean::double * generated_length as entropy_sum
  from staged_responses
  where
    sample_sign is not null
    and entropy_mean is not null
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
per_prompt as (
  select
    run_id,
    step,
    stage,
    phase,
    sample_sign,
    prompt_id,
    sum(entropy_sum) as entropy_sum,
    sum(generated_length) as tokens,
    count(*) as responses
  from responses
  group by all
),
per_sign as (
  select
    run_id,
    step,
    stage,
    phase,
    sample_sign,
    estimate_positive(list(step_prompt(step, prompt_id, entropy_sum, tokens))) as entropy,
    sum(tokens)::bigint as num_tokens,
    sum(responses)::bigint as num_responses,
    count(*) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    step,
    stage,
    phase,
    sample_sign,
    entropy.value as entropy,
    entropy.low as low,
    entropy.high as high,
    num_tokens,
    num_responses,
    num_prompts,
    num_tokens / sum(num_tokens) over (partition by run_id, step) as token_share,
    boundary_step,
    boundary_low,
    boundary_high
  from per_sign
  join stages using (run_id, stage)
  order by run_id, step, sample_sign
)
select * from final
