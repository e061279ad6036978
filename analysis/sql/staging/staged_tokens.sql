-- Tokens with what is known of their response. relative_position in [0, 1) counts from the response's first token.
create view staged_tokens as
select
  tokens.*,
  tokens.position / tokens.response_length as relative_position,
  staged_responses.stage,
  staged_responses.sample_sign
from tokens
join staged_responses
  on staged_responses.run_id = tokens.run_id
  and staged_responses.step = tokens.step
  and staged_responses.rollout_id = tokens.rollout_id;
