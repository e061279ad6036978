-- question: S3. Which words become more frequent in the rising stage, and which rarer?
-- grain: one row per run and word (lower case, without word-start marks), the $words largest rises and falls
-- params: $runs list of run_id, null = all; $words a side, null = 10; $min_count occurrences in both windows, null = 20
-- units: share_*, change = end - start, low, high in shares of a window's tokens (95 % interval over steps)
-- needs: tokens
with window_steps as (
  select run_id, step, "window"
  from staged_steps
  where "window" is not null and ($runs is null or list_contains($runs, run_id))
),
per_token as (
  select tokens.run_id, tokens.step, window_steps.window, tokens.token_id, count(*) as occurrences
  from tokens
  join window_steps on window_steps.run_id = tokens.run_id and window_steps.step = tokens.step
  group by all
),
per_word as (
  select
    per_token.run_id,
    per_token.window,
    per_token.step,
    vocab_words.word,
    min(vocab_words.category) as category,
    sum(per_token.occurrences) as occurrences
  from per_token
  join vocab_words on vocab_words.run_id = per_token.run_id and vocab_words.token_id = per_token.token_id
  group by all
),
frequent as (
  select run_id, word, min(category) as category
  from per_word
  group by run_id, word
  having sum(occurrences) >= coalesce($min_count, 20)::integer
),
per_step as (
  select run_id, "window", step, sum(occurrences) as tokens
  from per_word
  group by all
),
-- Steps without the word count as well, with 0.
per_window as (
  select
    run_id,
    word,
    frequent.category,
    "window",
    list(step_prompt(step, step, coalesce(per_word.occurrences, 0), per_step.tokens)) as shares,
    sum(coalesce(per_word.occurrences, 0))::bigint as num,
    sum(per_step.tokens)::bigint as num_tokens
  from frequent
  join per_step using (run_id)
  left join per_word using (run_id, "window", step, word)
  group by all
),
changes as (
  select
    s.run_id,
    s.word,
    s.category,
    s.shares as shares_start,
    e.shares as shares_end,
    e.num / e.num_tokens - s.num / s.num_tokens as change,
    s.num as num_start,
    e.num as num_end,
    s.num_tokens as num_tokens_start,
    e.num_tokens as num_tokens_end
  from per_window as s
  join per_window as e on e.run_id = s.run_id and e.word = s.word
  where s.window = 'start' and e.window = 'end'
),
ranked as (
  select
    *,
    row_number() over (partition by run_id order by change desc, word) as rank_rise,
    row_number() over (partition by run_id order by change, word) as rank_fall
  from changes
),
-- Only for the few words that are kept: there may be thousands.
estimated as (
  select *, estimate(shares_start) as share_start, estimate(shares_end) as share_end
  from ranked
  where
    (change > 0 and rank_rise <= coalesce($words, 10)::integer)
    or (change < 0 and rank_fall <= coalesce($words, 10)::integer)
),
-- The windows have no step in common, so that squares of errors add up.
final as (
  select
    run_id,
    word,
    category,
    share_start.value as share_start,
    share_end.value as share_end,
    change,
    change - sqrt(pow(share_start.high - share_start.value, 2) + pow(share_end.high - share_end.value, 2)) as low,
    change + sqrt(pow(share_start.high - share_start.value, 2) + pow(share_end.high - share_end.value, 2)) as high,
    num_start,
    num_end,
    num_tokens_start,
    num_tokens_end,
    rank_rise,
    rank_fall
  from estimated
  order by run_id, rank_rise
)
select * from final
