-- question: T1. Is entropy higher at both ends of a response than in its middle (U shape), by stage and sign?
-- grain: one row per run, stage, sample sign, and part; responses of five or more tokens in the update, with equal
--   weight
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: excess, low, high: entropy of the part / entropy of the middle - 1 (95% interval over steps and prompts);
--   num_* are counts
-- needs: tokens, entropies, token advantages
with fifths as (
  select fifths_by_prompt.*, token_steps.stage, token_steps.token_weight
  from fifths_by_prompt
  join token_steps on token_steps.run_id = fifths_by_prompt.run_id and token_steps.step = fifths_by_prompt.step
  where
    sample_sign is not null
    and ($runs is null or list_contains($runs, fifths_by_prompt.run_id))
    and ($stage is null or token_steps.stage = $stage)
),
-- 'beginning' is the first fifth, 'end' is the last fifth, and the middle is the three fifths between them.
parts as (
  select unnest(['beginning', 'end']) as part
),
per_prompt as (
  select
    run_id,
    stage,
    sample_sign,
    part,
    step,
    prompt_id,
    if(part = 'beginning', first_sum, last_sum) * token_weight as part_sum,
    middle_sum * token_weight as middle_sum,
    num_responses as responses
  from fifths, parts
),
per_part as (
  select
    run_id,
    stage,
    sample_sign,
    part,
    estimate_positive(list(step_prompt(step, prompt_id, part_sum, middle_sum))) as ratio,
    sum(responses)::bigint as num_responses,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
-- Both ends must be higher, so the two tests need no correction (intersection-union test).
final as (
  select
    run_id,
    stage,
    sample_sign,
    part,
    ratio.value - 1 as excess,
    ratio.low - 1 as low,
    ratio.high - 1 as high,
    num_responses,
    num_prompts,
    bool_and(coalesce(ratio.low > 1, false)) over (partition by run_id, stage, sample_sign) as has_u_shape
  from per_part
  order by run_id, stage desc, sample_sign, part
)
select * from final
