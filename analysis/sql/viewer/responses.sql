-- Which responses are there, and from which run, stage, and sign of advantage?
-- One row per run and response: arm and seed of the run, the columns of rollouts, and stage, phase, and sample_sign as
-- in staged_responses; null where a run has no stages.
select
  runs.arm,
  runs.seed,
  rollouts.*,
  staged_steps.stage,
  staged_steps.phase,
  sign_of(rollouts.is_kept, rollouts.advantage) as sample_sign
from rollouts
join runs on runs.run_id = rollouts.run_id
left join staged_steps on staged_steps.run_id = rollouts.run_id and staged_steps.step = rollouts.step
