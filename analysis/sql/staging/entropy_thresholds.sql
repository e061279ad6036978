-- Entropy from which on a token belongs to the top share (0.2 = 20 %) of a run's stage, among tokens in the update.
-- Found from a histogram whose bins are 0.5 % wide, one pass and no sort: the bin's lower edge, so at most 0.5 % too low.
-- Tokens are counted before they meet their stage, which spares a join of every token.
create macro entropy_thresholds(top) as table
with bins as (
  select run_id, step, floor(200 * ln(greatest(entropy, 1e-9)))::smallint as bin, count(*) as num_tokens
  from tokens
  where is_kept
  group by all
),
per_stage as (
  select bins.run_id, staged_steps.stage, bins.bin, sum(bins.num_tokens) as num_tokens
  from bins
  join staged_steps on staged_steps.run_id = bins.run_id and staged_steps.step = bins.step
  group by all
),
ranked as (
  select
    *,
    sum(num_tokens) over (partition by run_id, stage order by bin desc) as tokens_from,
    sum(num_tokens) over (partition by run_id, stage) as tokens_all
  from per_stage
)
select run_id, stage, exp(min(bin) / 200) as entropy_threshold
from ranked
where tokens_from - num_tokens < top * tokens_all
group by all;

-- Steps with their stage and its threshold: what a query that counts high-entropy tokens joins tokens to, once.
create macro steps_with_threshold(top) as table
select staged_steps.run_id, staged_steps.step, staged_steps.stage, thresholds.entropy_threshold
from staged_steps
join entropy_thresholds(top) as thresholds
  on thresholds.run_id = staged_steps.run_id and thresholds.stage = staged_steps.stage;
