-- question: I1. Are the high-entropy tokens of low-perplexity responses more often reasoning tokens, in the plateau?
-- grain: one row per run, step and prompt; low and high = first and last third of the group by perplexity
-- params: $runs list of run_id, null = all
-- units: *_tokens, *_reasoning in high-entropy tokens (top 20 % of the plateau's tokens in the update)
-- needs: tokens
with thresholds as (
  select *
  from steps_with_threshold(0.2)
  where stage = 'plateau' and ($runs is null or list_contains($runs, run_id))
),
per_response as (
  select
    tokens.run_id,
    tokens.rollout_id,
    count(*) as num_high,
    count(*) filter (where is_reasoning(tokens.category)) as num_reasoning
  from tokens
  join thresholds
    on thresholds.run_id = tokens.run_id
    and thresholds.step = tokens.step
    and tokens.entropy >= thresholds.entropy_threshold
  where tokens.advantage <> 0
  group by all
),
terciles as (
  select
    run_id,
    step,
    prompt_id,
    rollout_id,
    ntile(3) over (partition by run_id, step, prompt_id order by ppl, sample_index) as ppl_tercile
  from staged_responses
  where stage = 'plateau' and sample_sign is not null and ($runs is null or list_contains($runs, run_id))
),
final as (
  select
    run_id,
    step,
    prompt_id,
    coalesce(sum(num_high) filter (where ppl_tercile = 1), 0)::bigint as low_tokens,
    coalesce(sum(num_reasoning) filter (where ppl_tercile = 1), 0)::bigint as low_reasoning,
    coalesce(sum(num_high) filter (where ppl_tercile = 3), 0)::bigint as high_tokens,
    coalesce(sum(num_reasoning) filter (where ppl_tercile = 3), 0)::bigint as high_reasoning
  from terciles
  join per_response using (run_id, rollout_id)
  group by all
  order by all
)
select * from final
