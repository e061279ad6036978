-- Tokens in the update with after-update values. dp = change of the sampled token's probability by the update.
create view staged_movements as
select *, exp(logprob_after::double) - exp(logprob::double) as dp
from staged_tokens
where is_kept and logprob_after is not null;
