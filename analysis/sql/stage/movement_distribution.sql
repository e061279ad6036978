-- question: S5. How far does an update move the probabilities of the sampled tokens: do most barely move?
-- grain: one row per run, stage, sample sign, and bin of |dp| (width 0.25 in log10, the first is [0, 1e-6)), including
--   empty bins
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: bin_low, bin_high in units of |dp|; share, low, high in [0, 1] of the sign's tokens (95% interval over steps
--   and prompts); num_* are counts
-- needs: after-update values, log-probabilities, token advantages
with moved as (
  select
    run_id,
    step,
    prompt_id,
    advantage > 0 as is_positive,
    if(abs(dp) < 1e-6, -25, greatest(-24, least(-1, floor(4 * log10(abs(dp))))))::tinyint as bin,
    count(*) as tokens
  from moved_tokens
  where advantage <> 0 and ($runs is null or list_contains($runs, run_id))
  group by all
),
counted as (
  select
    moved.run_id,
    staged_steps.stage,
    if(is_positive, 'positive', 'negative') as sample_sign,
    moved.step,
    moved.prompt_id,
    moved.bin,
    moved.tokens
  from moved
  join staged_steps on staged_steps.run_id = moved.run_id and staged_steps.step = moved.step
  where $stage is null or staged_steps.stage = $stage
),
bins as (
  select unnest(range(-25, 0)) as bin
),
prompts as (
  select run_id, stage, sample_sign, step, prompt_id, sum(tokens) as tokens
  from counted
  group by all
),
per_prompt as (
  select prompts.*, bins.bin, coalesce(counted.tokens, 0) as in_bin
  from prompts
  cross join bins
  left join counted using (run_id, stage, sample_sign, step, prompt_id, bin)
),
per_bin as (
  select
    run_id,
    stage,
    sample_sign,
    bin,
    estimate_share(list(step_prompt(step, prompt_id, in_bin, tokens))) as share,
    sum(in_bin)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by run_id, stage, sample_sign, bin
),
final as (
  select
    run_id,
    stage,
    sample_sign,
    if(bin = -25, 0, pow(10, bin / 4)) as bin_low,
    pow(10, (bin + 1) / 4) as bin_high,
    share.value as share,
    share.low as low,
    share.high as high,
    num_tokens,
    num_prompts
  from per_bin
  order by run_id, stage desc, sample_sign, bin
)
select * from final
