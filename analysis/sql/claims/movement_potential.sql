-- question: S5. In the plateau, how far could random logit changes move each prompt's tokens, as given by p (1 - p)?
-- grain: one row per run, step, prompt, and bin (quarter octaves below 1/4), over tokens with after-update values
-- params: $runs: list of run_id (default all)
-- units: tokens in tokens; bin b holds p (1 - p) from 2^(-2 - (b + 1) / 4) to 2^(-2 - b / 4), and the last bin all
--   smaller values
-- needs: after-update values, log-probabilities
with final as (
  select
    counted.run_id,
    counted.step,
    counted.prompt_id,
    counted.bin,
    counted.tokens
  from (
    select run_id, step, prompt_id, potential_bin(exp(logprob::double)) as bin, count(*) as tokens
    from moved_tokens
    where $runs is null or list_contains($runs, run_id)
    group by all
  ) as counted
  join staged_steps on staged_steps.run_id = counted.run_id and staged_steps.step = counted.step
  where staged_steps.stage = 'plateau'
  order by all
)
select * from final
