-- question: S3. Which words become more frequent in the rising stage, and which become rarer?
-- grain: one row per run and word (lower case, without word-start marks), the $words largest rises and the $words
--   largest falls
-- params: $runs: list of run_id (default all); $words: integer in [1, 1000000], words per direction (default 10);
--   $min_count: integer in [1, 1000000], minimum occurrences in both phases together (default 20)
-- units: share_start, share_end in [0, 1] of the tokens of a phase; change = share_end - share_start, low, high (95%
--   interval over steps); num_* in tokens; rank_* from 1
-- needs: tokens, token categories
with phase_steps as (
  select run_id, step, phase, token_weight
  from token_steps
  where phase is not null and ($runs is null or list_contains($runs, run_id))
),
per_token as (
  select
    tokens.run_id,
    tokens.step,
    phase_steps.phase,
    phase_steps.token_weight,
    tokens.token_id,
    count(*) as occurrences
  from tokens
  join phase_steps on phase_steps.run_id = tokens.run_id and phase_steps.step = tokens.step
  group by all
),
per_word as (
  select
    per_token.run_id,
    per_token.phase,
    per_token.step,
    per_token.token_weight,
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
  select run_id, phase, step, token_weight, sum(occurrences) as tokens
  from per_word
  group by all
),
-- A step without the word counts as 0.
per_phase as (
  select
    run_id,
    word,
    frequent.category,
    phase,
    list(
      step_prompt(
        step, step, coalesce(per_word.occurrences, 0) * per_step.token_weight, per_step.tokens * per_step.token_weight
      )
    ) as shares,
    sum(coalesce(per_word.occurrences, 0) * per_step.token_weight)
    / sum(per_step.tokens * per_step.token_weight) as share,
    sum(coalesce(per_word.occurrences, 0))::bigint as num,
    sum(per_step.tokens)::bigint as num_tokens
  from frequent
  join per_step using (run_id)
  left join per_word using (run_id, phase, step, word)
  group by all
),
changes as (
  select
    s.run_id,
    s.word,
    s.category,
    s.shares as shares_start,
    e.shares as shares_end,
    e.share - s.share as change,
    s.num as num_start,
    e.num as num_end,
    s.num_tokens as num_tokens_start,
    e.num_tokens as num_tokens_end
  from per_phase as s
  join per_phase as e on e.run_id = s.run_id and e.word = s.word
  where s.phase = 'start' and e.phase = 'end'
),
ranked as (
  select
    *,
    row_number() over (partition by run_id order by change desc, word) as rank_rise,
    row_number() over (partition by run_id order by change, word) as rank_fall
  from changes
),
-- Intervals are computed only for the selected words, because there may be thousands of others.
estimated as (
  select *, estimate(shares_start) as share_start, estimate(shares_end) as share_end
  from ranked
  where
    (change > 0 and rank_rise <= coalesce($words, 10)::integer)
    or (change < 0 and rank_fall <= coalesce($words, 10)::integer)
),
-- The phases share no step, so the squares of their errors add.
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
