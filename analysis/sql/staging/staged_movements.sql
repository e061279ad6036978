-- How far did the update move the probability of each token?
-- One row per token in the update with after-update values: the columns of tokens, and dp in [-1, 1], the change of the
-- sampled token's probability. Questions join sums over these rows with stages, because joining every token would take
-- most of the time.
create view moved_tokens as
select *, exp(logprob_after::double) - exp(logprob::double) as dp
from tokens
where is_kept and logprob is not null and logprob_after is not null;

-- The same rows, with the columns of staged_tokens as well.
create view staged_movements as
select *, exp(logprob_after::double) - exp(logprob::double) as dp
from staged_tokens
where is_kept and logprob is not null and logprob_after is not null;
