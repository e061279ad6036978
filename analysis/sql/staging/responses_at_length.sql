-- Responses with surprisal_at_length: mean surprisal relative to the group, less what the length explains. Longer
-- responses have other perplexities whether they are right or not; the slope on log length is that within groups, of
-- the run's stage. Nats per token.
create view responses_at_length as
with centered as (
  select
    *,
    surprisal_mean - avg(surprisal_mean) over (partition by run_id, group_id) as surprisal_in_group,
    ln(response_length) - avg(ln(response_length)) over (partition by run_id, group_id) as length_in_group
  from staged_responses
  where ppl is not null and surprisal_mean is not null and response_length > 0
),
slopes as (
  select
    run_id,
    stage,
    coalesce(sum(surprisal_in_group * length_in_group) / nullif(sum(length_in_group * length_in_group), 0), 0) as slope
  from centered
  group by all
)
select centered.*, surprisal_in_group - slope * length_in_group as surprisal_at_length
from centered
join slopes using (run_id, stage);
