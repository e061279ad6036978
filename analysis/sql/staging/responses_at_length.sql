-- How surprising is each response, compared with responses of equal length to the same prompt?
-- One row per run and response with a known perplexity: the columns of staged_responses, and surprisal_at_length in
-- nats per token. That is the mean surprisal minus the group mean, minus slope * (log length minus its group mean).
-- Length changes perplexity for correct and incorrect responses alike; slope is the within-group slope per run and
-- stage.
create view responses_at_length as
with centered as (
  select
    *,
    surprisal_mean - avg(surprisal_mean) over (partition by run_id, group_id) as surprisal_in_group,
    ln(generated_length) - avg(ln(generated_length)) over (partition by run_id, group_id) as length_in_group
  from staged_responses
  where ppl is not null and surprisal_mean is not null and generated_length > 0
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
join slopes on slopes.run_id = centered.run_id and slopes.stage = centered.stage;
