-- Entropy from which on a token belongs to the top share (0.2 = 20 %) of a run's stage, among tokens in the update. Found
-- from a histogram whose bins are 0.1 % wide, one pass and no sort: the bin's lower edge, so at most 0.1 % too low.
create macro entropy_thresholds(top) as table
with bins as (
  select run_id, stage, floor(1000 * ln(greatest(entropy, 1e-9)))::integer as bin, count(*) as tokens
  from staged_tokens
  where sample_sign is not null
  group by all
),
ranked as (
  select
    *,
    sum(tokens) over (partition by run_id, stage order by bin desc) as tokens_from,
    sum(tokens) over (partition by run_id, stage) as tokens_all
  from bins
)
select run_id, stage, exp(min(bin) / 1000) as entropy_threshold
from ranked
where tokens_from - tokens < top * tokens_all
group by all;
