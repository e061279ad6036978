-- Tokens with their stage and the sign of their response: that of its advantage, null where the response did not take
-- part in the update or its advantage is 0. relative_position in [0, 1) counts from the response's first token.
create view staged_tokens as
select
  tokens.*,
  tokens.position / tokens.response_length as relative_position,
  staged_steps.stage,
  case
    when tokens.is_kept and tokens.advantage > 0 then 'positive'
    when tokens.is_kept and tokens.advantage < 0 then 'negative'
  end as sample_sign
from tokens
join staged_steps on staged_steps.run_id = tokens.run_id and staged_steps.step = tokens.step;
