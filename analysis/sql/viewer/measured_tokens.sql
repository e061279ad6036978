-- What was measured of each token?
-- One row per token of a response, context included: the columns of response_tokens with quantities that follow from
-- them. dp, dlogprob, and dentropy are changes by the step's update; mismatch is trainer minus engine, and
-- reference_gap policy minus reference.
select
  *,
  -logprob as surprisal,
  shaped_advantage - advantage as advantage_change,
  exp(logprob_after::double) - exp(logprob::double) as dp,
  logprob_after - logprob as dlogprob,
  entropy_after - entropy as dentropy,
  logprob - sampling_logprob as mismatch,
  logprob - reference_logprob as reference_gap
from response_tokens
