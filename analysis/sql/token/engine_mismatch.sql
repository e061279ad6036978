-- question: How far do the probabilities of the inference engine differ from those of the trainer?
-- grain: one row per run, breakdown (step, position, entropy), and bin (0 = lowest), over all sampled tokens
-- params: $runs: list of run_id (default all); $bins: integer in [1, 1000000], bins of each breakdown (default 10)
-- units: bin_mid in (0, 1]: middle of the bin in the run, in the response, or among tokens by entropy; kl, low, high in
--   nats per token (95% interval over steps and prompts); ratio_mean is p trainer / p engine; ratio_share in [0, 1]:
--   tokens with a ratio outside [1/2, 2]; difference_max in nats: largest |ln ratio|; num_* are counts
-- needs: tokens, log-probabilities, engine log-probabilities
with measured as (
  select
    tokens.run_id,
    tokens.step,
    tokens.prompt_id,
    token_steps.token_weight,
    logprob::double - sampling_logprob as difference,
    least(
      bin_of_position(tokens.position, tokens.response_length, coalesce($bins, 10)), coalesce($bins, 10)::integer - 1
    ) as position_bin,
    floor(1000 * ln(if(entropy < 1e-9, 1e-9, entropy)))::integer as entropy_bin
  from tokens
  join token_steps on token_steps.run_id = tokens.run_id and token_steps.step = tokens.step
  where
    logprob is not null
    and sampling_logprob is not null
    and ($runs is null or list_contains($runs, tokens.run_id))
),
-- The engine sampled the tokens, so ratio - 1 - ln ratio has the mean KL(engine, trainer), and is never negative.
counted as (
  select
    run_id,
    step,
    prompt_id,
    position_bin,
    entropy_bin,
    any_value(token_weight) as token_weight,
    sum(exp(difference) - 1 - difference) as kl_sum,
    sum(exp(difference)) as ratio_sum,
    count(*) filter (where abs(difference) > ln(2)) as far,
    max(abs(difference)) as difference_max,
    count(*) as tokens
  from measured
  group by run_id, step, prompt_id, position_bin, entropy_bin
),
spans as (
  select run_id, min(step) as first_step, max(step) as last_step
  from counted
  group by all
),
ranks as (
  select
    run_id,
    entropy_bin,
    floor(
      coalesce($bins, 10)::bigint * (sum(tokens) over (partition by run_id order by entropy_bin) - tokens)
      / sum(tokens) over (partition by run_id)
    )::bigint as bin
  from (
    select run_id, entropy_bin, sum(tokens) as tokens
    from counted
    where entropy_bin is not null
    group by all
  )
),
per_bin as (
  select
    counted.*,
    'step' as breakdown,
    (counted.step - first_step) * coalesce($bins, 10)::bigint // (last_step - first_step + 1) as bin
  from counted
  join spans on spans.run_id = counted.run_id
  union all
  select *, 'position' as breakdown, position_bin as bin
  from counted
  union all
  select counted.*, 'entropy' as breakdown, ranks.bin
  from counted
  join ranks on ranks.run_id = counted.run_id and ranks.entropy_bin = counted.entropy_bin
),
per_prompt as (
  select
    run_id,
    breakdown,
    bin,
    step,
    prompt_id,
    any_value(token_weight) as token_weight,
    sum(kl_sum) as kl_sum,
    sum(ratio_sum) as ratio_sum,
    sum(far) as far,
    max(difference_max) as difference_max,
    sum(tokens) as tokens
  from per_bin
  group by all
),
estimated as (
  select
    run_id,
    breakdown,
    bin,
    estimate_positive(list(step_prompt(step, prompt_id, kl_sum * token_weight, tokens * token_weight))) as kl,
    sum(ratio_sum * token_weight) / sum(tokens * token_weight) as ratio_mean,
    sum(far * token_weight) / sum(tokens * token_weight) as ratio_share,
    max(difference_max) as difference_max,
    sum(tokens)::bigint as num_tokens,
    count(distinct prompt_id) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    run_id,
    breakdown,
    bin,
    (bin + 0.5) / coalesce($bins, 10)::bigint as bin_mid,
    kl.value as kl,
    kl.low as low,
    kl.high as high,
    ratio_mean,
    ratio_share,
    difference_max,
    num_tokens,
    num_prompts
  from estimated
  order by run_id, breakdown, bin
)
select * from final
