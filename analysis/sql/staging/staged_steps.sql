-- Steps with their stage. window: 'start' = the run's first steps, 'end' = the last of the rising stage; both are
-- half the rising stage long, 10 steps at most.
create view staged_steps as
with rising as (
  select run_id, first_step, last_step, greatest(1, least(10, (last_step - first_step + 1) // 2)) as window_steps
  from stages
  where stage = 'rising'
)
select
  steps.*,
  stages.stage,
  case
    when steps.step < rising.first_step + rising.window_steps then 'start'
    when steps.step > rising.last_step - rising.window_steps and steps.step <= rising.last_step then 'end'
  end as window,
  stages.boundary_step,
  stages.boundary_low,
  stages.boundary_high
from steps
join stages on stages.run_id = steps.run_id and steps.step between stages.first_step and stages.last_step
left join rising on rising.run_id = steps.run_id;
