-- What is usual at each relative position of the responses of one run and stage?
-- One row per twentieth of a response: mean, first and last decile, and number of tokens. A placeholder names the
-- quantity, one of those in response_tokens.sql.
select
  least(floor(20 * relative_position), 19)::integer as bin,
  avg(value) as mean,
  quantile_cont(value, 0.1) as low,
  quantile_cont(value, 0.9) as high,
  count(*) as num_tokens
from (
  select
    relative_position,
    {quantity} as value
  from staged_tokens
  where run_id = $run and stage = $stage
)
where value is not null
group by bin
order by bin
