-- What is usual at each relative position of the responses of one run and stage?
-- One row per twentieth of a response: mean, first and last decile, and number of tokens. The caller defines
-- "measured", with relative_position and the quantity.
select
  least(floor(20 * relative_position), 19)::integer as bin,
  avg(quantity) as mean,
  quantile_cont(quantity, 0.1) as low,
  quantile_cont(quantity, 0.9) as high,
  count(*) as num_tokens
from measured
where quantity is not null
group by bin
order by bin
