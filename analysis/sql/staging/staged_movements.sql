-- How far did the update move the probability of each token?
-- One row per token in the update with after-update values: the columns of staged_tokens, and dp in [-1, 1], the change
-- of the sampled token's probability.
create view staged_movements as
select *, exp(logprob_after::double) - exp(logprob::double) as dp
from staged_tokens
where is_kept and logprob is not null and logprob_after is not null;
