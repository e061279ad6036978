-- question: S6, T3. Where in a response are the high-entropy tokens?
-- grain: one row per run, stage, and bin of relative position (0 = first), over tokens in the update
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $bins: integer in [1, 1000],
--   bins of position (default 10); $top: number in (0, 1], share of tokens that count as high-entropy (default 0.2)
-- units: position_mid in [0, 1]; share, low, high in [0, 1] of the bin's tokens (95% interval over steps and prompts);
--   share_of_high in [0, 1] of the high-entropy tokens; entropy_threshold in nats; num_* are counts
-- needs: tokens, entropies
with
-- High-entropy tokens are the $top share of the stage's tokens in the update. The threshold is at most 0.5% too low.
thresholds as (
  select *, row_number() over (order by run_id, step) as step_id
  from steps_with_threshold(coalesce($top, 0.2))
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
-- Grouping by an integer takes half as long as by run, stage, and step.
counted as (
  select
    thresholds.step_id,
    tokens.prompt_id,
    bin_of_position(tokens.position, tokens.response_length, coalesce($bins, 10)) as position_bin,
    count(*) as tokens,
    count(*) filter (where tokens.entropy >= thresholds.entropy_threshold) as high_tokens
  from tokens
  join thresholds on thresholds.run_id = tokens.run_id and thresholds.step = tokens.step
  where
    tokens.is_kept
    and tokens.entropy is not null
    and ($runs is null or list_contains($runs, tokens.run_id))
  group by all
),
per_prompt as (
  select counted.*, thresholds.* exclude (step_id)
  from counted
  join thresholds using (step_id)
),
per_bin as (
  select
    run_id,
    stage,
    position_bin,
    estimate_share(list(step_prompt(step, prompt_id, high_tokens * token_weight, tokens * token_weight))) as share,
    sum(high_tokens)::bigint as num_high,
    sum(high_tokens * token_weight) as weighted_high,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts,
    any_value(entropy_threshold) as entropy_threshold
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    position_bin,
    (position_bin + 0.5) / coalesce($bins, 10)::integer as position_mid,
    share.value as share,
    share.low as low,
    share.high as high,
    num_high,
    num_tokens,
    num_prompts,
    entropy_threshold,
    weighted_high / sum(weighted_high) over (partition by run_id, stage) as share_of_high
  from per_bin
  order by run_id, stage desc, position_bin
)
select * from final
