-- question: S6, T3. Which words are the high-entropy tokens?
-- grain: one row per run, stage, and word, the $words most frequent among the high-entropy tokens in the update
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $top: number in (0, 1], share
--   of tokens that count as high-entropy (default 0.2); $words: integer in [1, 1000000], words (default 15)
-- units: share, low, high in [0, 1] of high-entropy tokens (95% interval over steps); high_rate in [0, 1] of the
--   word's tokens; entropy_mean in nats; num_* are counts; rank from 1
-- needs: tokens, entropies, token categories
with
-- High-entropy tokens are the $top share of the stage's tokens in the update. The threshold is at most 0.5% too low.
thresholds as (
  select *
  from steps_with_threshold(coalesce($top, 0.2))
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
counted as (
  select
    tokens.run_id,
    any_value(thresholds.stage) as stage,
    any_value(thresholds.token_weight) as token_weight,
    tokens.step,
    tokens.token_id,
    count(*) as tokens,
    count(*) filter (where tokens.entropy >= thresholds.entropy_threshold) as high_tokens,
    sum(tokens.entropy) as entropy_sum
  from tokens
  join thresholds on thresholds.run_id = tokens.run_id and thresholds.step = tokens.step
  where
    tokens.is_kept
    and tokens.entropy is not null
    and ($runs is null or list_contains($runs, tokens.run_id))
  group by tokens.run_id, tokens.step, tokens.token_id
),
per_step as (
  select
    counted.run_id,
    counted.stage,
    vocab_words.word as text,
    counted.step,
    counted.token_weight,
    min(vocab_words.category) as category,
    sum(counted.tokens) as tokens,
    sum(counted.high_tokens) as high_tokens,
    sum(counted.entropy_sum) as entropy_sum
  from counted
  join vocab_words on vocab_words.run_id = counted.run_id and vocab_words.token_id = counted.token_id
  group by all
),
most_frequent as (
  select
    run_id,
    stage,
    text,
    min(category) as category,
    sum(tokens)::bigint as num_all,
    sum(high_tokens)::bigint as num_high,
    sum(high_tokens * token_weight) / sum(tokens * token_weight) as high_rate,
    sum(entropy_sum * token_weight) / sum(tokens * token_weight) as entropy_mean,
    row_number() over (partition by run_id, stage order by sum(high_tokens * token_weight) desc, text) as rank
  from per_step
  group by run_id, stage, text
  having sum(high_tokens) > 0
  qualify rank <= coalesce($words, 15)::integer
),
steps_with_any as (
  select run_id, stage, step, token_weight, sum(high_tokens) as all_high_tokens
  from per_step
  group by all
  having all_high_tokens > 0
),
-- A step without the word counts as 0.
shares as (
  select
    run_id,
    stage,
    text,
    estimate_share(
      list(
        step_prompt(
          step,
          step,
          coalesce(high_tokens, 0) * steps_with_any.token_weight,
          all_high_tokens * steps_with_any.token_weight
        )
      )
    ) as share,
    count(*) as num_steps
  from most_frequent
  join steps_with_any using (run_id, stage)
  left join per_step using (run_id, stage, text, step)
  group by all
),
final as (
  select
    run_id,
    stage,
    rank,
    text,
    category,
    share.value as share,
    share.low as low,
    share.high as high,
    high_rate,
    entropy_mean,
    num_high,
    num_all,
    num_steps
  from most_frequent
  join shares using (run_id, stage, text)
  order by run_id, stage desc, rank
)
select * from final
