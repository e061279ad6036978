-- question: I1. In the plateau, are the high-entropy tokens of low-perplexity responses more often reasoning tokens?
-- grain: one row per run, step, and group; low and high are its first and last tercile by length-adjusted perplexity
-- params: $runs: list of run_id (default all)
-- units: low_tokens, high_tokens: high-entropy tokens (top 20% of the tokens in the update), by token_weight;
--   low_excess, high_excess: reasoning tokens among them minus the number expected at their positions
-- needs: tokens, entropies, perplexities, advantages, token categories
with thresholds as (
  select *
  from steps_with_threshold(0.2)
  where stage = 'plateau' and ($runs is null or list_contains($runs, run_id))
),
high as (
  select
    tokens.run_id,
    tokens.rollout_id,
    bin_of_position(tokens.position, tokens.response_length, 10) as place,
    any_value(thresholds.token_weight) * count(*) as num_high,
    any_value(thresholds.token_weight) * count(*) filter (where is_reasoning(tokens.category)) as num_reasoning
  from tokens
  join thresholds
    on thresholds.run_id = tokens.run_id
    and thresholds.step = tokens.step
    and tokens.entropy >= thresholds.entropy_threshold
  where tokens.is_kept and ($runs is null or list_contains($runs, tokens.run_id))
  group by all
),
-- The expected share per tenth of the response removes effects of position from the comparison.
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
    coalesce(sum(num_high) filter (where ppl_tercile = 1), 0) as low_tokens,
    coalesce(sum(excess) filter (where ppl_tercile = 1), 0) as low_excess,
    coalesce(sum(num_high) filter (where ppl_tercile = 3), 0) as high_tokens,
    coalesce(sum(excess) filter (where ppl_tercile = 3), 0) as high_excess
  from terciles
  join per_response using (run_id, rollout_id)
  group by run_id, step, group_id
  order by run_id, step, group_id
)
select * from final
