-- How are the entropies of the tokens in the update distributed?
-- One row per run, stage, and histogram bin of 0.5% width: num_tokens, in which tokens count by token_weight. Counts
-- are joined with stages, because joining every token would take most of the time. Several questions need a threshold,
-- so these rows are kept while the runs are open.
create view entropy_bins as
with bins as (
  select run_id, step, floor(200 * ln(greatest(entropy, 1e-9)))::smallint as bin, count(*) as num_tokens
  from tokens
  where is_kept and entropy is not null
  group by all
)
select bins.run_id, token_steps.stage, bins.bin, sum(bins.num_tokens * token_steps.token_weight) as num_tokens
from bins
join token_steps on token_steps.run_id = bins.run_id and token_steps.step = bins.step
group by all;

-- At which entropy does the top share of tokens begin (top = 0.2 for 20%)?
-- One row per run and stage, over tokens in the update: entropy_threshold in nats. A token is high-entropy if its
-- entropy is at least the threshold. The threshold is the lower edge of a bin of entropy_bins, which takes one pass and
-- no sort, and is at most 0.5% below the exact quantile.
create macro entropy_thresholds(top) as table
  with ranked as (
    select
      *,
      sum(num_tokens) over (partition by run_id, stage order by bin desc) as tokens_from,
      sum(num_tokens) over (partition by run_id, stage) as tokens_all
    from entropy_bins
  )
  select run_id, stage, exp(min(bin) / 200) as entropy_threshold
  from ranked
  where tokens_from - num_tokens < top * tokens_all
  group by all;

-- Which threshold applies at each step?
-- One row per run and step with tokens: stage, token_weight, and entropy_threshold in nats. Queries that count
-- high-entropy tokens join tokens with this table only.
create macro steps_with_threshold(top) as table
  select
    token_steps.run_id,
    token_steps.step,
    token_steps.stage,
    token_steps.token_weight,
    thresholds.entropy_threshold
  from token_steps
  join entropy_thresholds(top) as thresholds
    on thresholds.run_id = token_steps.run_id and thresholds.stage = token_steps.stage;
