-- Which stage, sign, and relative position does each token have?
-- One row per run, response, and token: the columns of tokens, stage, and sample_sign ('positive' or 'negative', the
-- sign of the response's advantage; null for a zero advantage or a response outside the update). relative_position in
-- [0, 1) is position / response_length; the first token has 0.
create view staged_tokens as
select
  tokens.*,
  tokens.position / tokens.response_length as relative_position,
  staged_steps.stage,
  sign_of(tokens.is_kept, tokens.advantage) as sample_sign
from tokens
join staged_steps on staged_steps.run_id = tokens.run_id and staged_steps.step = tokens.step;
