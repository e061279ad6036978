-- question: I1. Are the high-entropy tokens of low-perplexity responses more often reasoning tokens?
-- grain: one row per run, stage, tercile of length-adjusted perplexity (1 = lowest), and category, over tokens in the
--   update
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $top: number in (0, 1], share
--   of tokens that count as high-entropy (default 0.2)
-- units: share, low, high in [0, 1] of the num_tokens high-entropy tokens of the tercile (95% interval over steps and
--   prompts); num_prompts in prompts
-- needs: tokens, entropies, perplexities, token categories
with
-- High-entropy tokens are the $top share of the stage's tokens in the update. The threshold is at most 0.5% too low.
thresholds as (
  select *
  from steps_with_threshold(coalesce($top, 0.2))
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
high_entropy as (
  select tokens.run_id, tokens.rollout_id, tokens.category, thresholds.token_weight, count(*) as tokens
  from tokens
  join thresholds
    on thresholds.run_id = tokens.run_id
    and thresholds.step = tokens.step
    and tokens.entropy >= thresholds.entropy_threshold
  where tokens.is_kept and ($runs is null or list_contains($runs, tokens.run_id))
  group by all
),
terciles as (
  select
    run_id,
    stage,
    step,
    prompt_id,
    rollout_id,
    ntile(3) over (partition by run_id, group_id order by surprisal_at_length, sample_index) as ppl_tercile
  from responses_at_length
  where
    is_kept
    and ($runs is null or list_contains($runs, run_id))
    and ($stage is null or stage = $stage)
),
-- 'reasoning' combines formal_reasoning, logical_structuring, and metacognitive.
kinds as (
  select
    unnest([
      'reasoning', 'formal_reasoning', 'logical_structuring', 'metacognitive', 'semantic_support', 'special'
    ]) as category
),
per_tercile as (
  select
    run_id,
    stage,
    ppl_tercile,
    category,
    step,
    prompt_id,
    any_value(token_weight) as token_weight,
    sum(tokens) as tokens
  from high_entropy
  join terciles using (run_id, rollout_id)
  group by all
),
per_prompt as (
  select
    run_id,
    stage,
    ppl_tercile,
    kinds.category,
    step,
    prompt_id,
    any_value(token_weight) as token_weight,
    sum(tokens) as tokens,
    sum(
      if(
        per_tercile.category = kinds.category
        or kinds.category = 'reasoning' and is_reasoning(per_tercile.category),
        tokens,
        0
      )
    ) as tokens_of_category
  from per_tercile
  cross join kinds
  group by all
),
per_category as (
  select
    run_id,
    stage,
    ppl_tercile,
    category,
    estimate_share(
      list(step_prompt(step, prompt_id, tokens_of_category * token_weight, tokens * token_weight))
    ) as share,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    stage,
    ppl_tercile,
    category,
    share.value as share,
    share.low as low,
    share.high as high,
    num_tokens,
    num_prompts
  from per_category
  order by run_id, stage desc, ppl_tercile, category
)
select * from final
