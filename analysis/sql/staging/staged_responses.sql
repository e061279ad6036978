-- Responses with their stage, window and sign: the sign of the group-relative advantage of responses that took part in
-- the update, null for the rest.
create view staged_responses as
select
  rollouts.*,
  staged_steps.stage,
  staged_steps.window,
  case
    when rollouts.is_kept and rollouts.advantage > 0 then 'positive'
    when rollouts.is_kept and rollouts.advantage < 0 then 'negative'
  end as sample_sign
from rollouts
join staged_steps on staged_steps.run_id = rollouts.run_id and staged_steps.step = rollouts.step;
