-- Which stage, phase, and sign does each response have?
-- One row per run and response: the columns of rollouts, stage, phase, and sample_sign. sample_sign is the sign of the
-- group-relative advantage ('positive' or 'negative'); it is null for a zero advantage or a response outside the
-- update.
create view staged_responses as
select
  rollouts.*,
  staged_steps.stage,
  staged_steps.phase,
  sign_of(rollouts.is_kept, rollouts.advantage) as sample_sign
from rollouts
join staged_steps on staged_steps.run_id = rollouts.run_id and staged_steps.step = rollouts.step;
