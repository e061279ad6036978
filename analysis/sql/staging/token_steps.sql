-- Which steps have tokens, and how much of the run does each of them stand for?
-- One row per run and step with tokens: stage, phase, step_weight, and token_weight. Means over the tokens of a stage
-- weight each token by token_weight, so that it does not matter on which steps, and of which share of the responses,
-- tokens are stored. step_weight is the number of steps that the step stands for within its stage: a step without
-- tokens counts half for either neighbor with tokens, as in linear interpolation. token_weight is step_weight times
-- the number of responses of the step per response with tokens. Both are 1 if all tokens are stored.
create view token_steps as
with neighbors as (
  select
    run_id,
    stage,
    last_value(if(num_with_tokens > 0, step, null) ignore nulls) over before as previous_step,
    first_value(if(num_with_tokens > 0, step, null) ignore nulls) over after as next_step
  from staged_steps
  join token_coverage using (run_id, step)
  window
    before as (partition by run_id, stage order by step),
    after as (partition by run_id, stage order by step rows between current row and unbounded following)
),
halves as (
  select run_id, coalesce(previous_step, next_step) as step
  from neighbors
  union all
  select run_id, coalesce(next_step, previous_step) as step
  from neighbors
),
weights as (
  select run_id, step, count(*) / 2 as step_weight
  from halves
  group by all
)
select
  run_id,
  step,
  staged_steps.stage,
  staged_steps.phase,
  step_weight,
  step_weight * num_responses / num_with_tokens as token_weight
from weights
join staged_steps using (run_id, step)
join token_coverage using (run_id, step);
