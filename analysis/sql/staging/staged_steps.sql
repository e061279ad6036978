-- Which stage and phase does each training step belong to?
-- One row per run and step: the columns of steps, the stage (rising or plateau), and boundary_* in steps. phase is
-- 'start' for the first steps of the run and 'end' for the last steps of the rising stage, otherwise null. Each phase
-- covers half of the rising stage, and at most 10 steps.
create view staged_steps as
with rising as (
  select run_id, first_step, last_step, greatest(1, least(10, (last_step - first_step + 1) // 2)) as phase_steps
  from stages
  where stage = 'rising'
)
select
  steps.*,
  stages.stage,
  case
    when steps.step < rising.first_step + rising.phase_steps then 'start'
    when steps.step > rising.last_step - rising.phase_steps and steps.step <= rising.last_step then 'end'
  end as phase,
  stages.boundary_step,
  stages.boundary_low,
  stages.boundary_high
from steps
join stages on stages.run_id = steps.run_id and steps.step between stages.first_step and stages.last_step
left join rising on rising.run_id = steps.run_id;
