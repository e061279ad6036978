-- question: I1. Are the high-entropy tokens of low-perplexity responses more often reasoning tokens, in the plateau?
-- grain: one row per run, step and group; low and high = first and last third of the group by perplexity at equal length
-- params: $runs list of run_id, null = all
-- units: *_tokens in high-entropy tokens (top 20 % of those in the update); *_excess in reasoning tokens beyond the usual
-- needs: tokens
with thresholds as (
  select *
  from steps_with_threshold(0.2)
  where stage = 'plateau' and ($runs is null or list_contains($runs, run_id))
),
high as (
  select
    tokens.run_id,
    tokens.rollout_id,
    tokens.position * 10 // tokens.response_length as place,
    count(*) as num_high,
    count(*) filter (where is_reasoning(tokens.category)) as num_reasoning
  from tokens
  join thresholds
    on thresholds.run_id = tokens.run_id
    and thresholds.step = tokens.step
    and tokens.entropy >= thresholds.entropy_threshold
  where tokens.is_kept
  group by all
),
-- What is usual at a place is no property of the responses that have many high-entropy tokens there.
expected as (
  select run_id, place, sum(num_reasoning) / sum(num_high) as reasoning_share
  from high
  group by all
),
per_response as (
  select
    high.run_id,
    high.rollout_id,
    sum(num_high) as num_high,
    sum(num_reasoning - num_high * reasoning_share) as excess
  from high
  join expected using (run_id, place)
  group by all
),
terciles as (
  select
    run_id,
    step,
    group_id,
    prompt_id,
    rollout_id,
    ntile(3) over (partition by run_id, group_id order by surprisal_at_length, sample_index) as ppl_tercile
  from responses_at_length
  where stage = 'plateau' and sample_sign is not null and ($runs is null or list_contains($runs, run_id))
),
final as (
  select
    run_id,
    step,
    any_value(prompt_id) as prompt_id,
    coalesce(sum(num_high) filter (where ppl_tercile = 1), 0)::bigint as low_tokens,
    coalesce(sum(excess) filter (where ppl_tercile = 1), 0) as low_excess,
    coalesce(sum(num_high) filter (where ppl_tercile = 3), 0)::bigint as high_tokens,
    coalesce(sum(excess) filter (where ppl_tercile = 3), 0) as high_excess
  from terciles
  join per_response using (run_id, rollout_id)
  group by run_id, step, group_id
  order by run_id, step, group_id
)
select * from final
