-- question: How many of the tokens with the highest entropy had the highest entropy under the reference policy, too?
-- grain: one row per run and step, over tokens in the update with both entropies
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both); $bins: integer in [1, 1000],
--   bins of position (default 10); $top: number in (0, 1], share of tokens that count as high-entropy (default 0.2)
-- units: share, low, high in [0, 1] of the step's high-entropy tokens (95% interval over prompts); by_position = same
--   share if the tokens of equal step and position exchanged their entropies, independent = if those of the step did;
--   num_high, num_tokens in tokens; num_prompts in prompts; boundary_* in steps
-- needs: entropies, reference entropies
with measured as (
  select
    run_id,
    step,
    prompt_id,
    bin_of_position(position, response_length, coalesce($bins, 10)) as position_bin,
    entropy::double as entropy,
    reference_entropy::double as reference_entropy
  from tokens
  where
    is_kept
    and entropy is not null
    and reference_entropy is not null
    and ($runs is null or list_contains($runs, run_id))
),
-- High-entropy tokens are the $top share of the step's tokens, under either policy.
thresholds as (
  select
    run_id,
    step,
    quantile_cont(entropy, 1 - coalesce($top, 0.2)) as threshold,
    quantile_cont(reference_entropy, 1 - coalesce($top, 0.2)) as reference_threshold
  from measured
  group by all
),
counted as (
  select
    measured.run_id,
    measured.step,
    measured.prompt_id,
    measured.position_bin,
    count(*) as tokens,
    count(*) filter (where measured.entropy >= thresholds.threshold) as high_tokens,
    count(*) filter (where measured.reference_entropy >= thresholds.reference_threshold) as reference_tokens,
    count(*) filter (
      where measured.entropy >= thresholds.threshold and measured.reference_entropy >= thresholds.reference_threshold
    ) as both_tokens
  from measured
  join thresholds on thresholds.run_id = measured.run_id and thresholds.step = measured.step
  group by all
),
-- Share of the tokens that are high-entropy under the reference policy: what a high-entropy token would find after an
-- exchange of entropies within its bin, or within its step.
with_rates as (
  select
    *,
    sum(reference_tokens) over of_bin / sum(tokens) over of_bin as bin_rate,
    sum(reference_tokens) over of_step / sum(tokens) over of_step as step_rate
  from counted
  window of_bin as (partition by run_id, step, position_bin), of_step as (partition by run_id, step)
),
per_prompt as (
  select
    run_id,
    step,
    prompt_id,
    sum(tokens) as tokens,
    sum(high_tokens) as high_tokens,
    sum(both_tokens) as both_tokens,
    sum(high_tokens * bin_rate order by high_tokens * bin_rate) as by_position,
    sum(high_tokens) * any_value(step_rate) as independent
  from with_rates
  group by all
),
per_step as (
  select
    run_id,
    step,
    estimate_share(list(step_prompt(step, prompt_id, both_tokens, high_tokens))) as share,
    sum(by_position order by by_position) / sum(high_tokens) as by_position,
    sum(independent order by independent) / sum(high_tokens) as independent,
    sum(high_tokens)::bigint as num_high,
    sum(tokens)::bigint as num_tokens,
    count(*) as num_prompts
  from per_prompt
  group by all
),
final as (
  select
    per_step.run_id,
    per_step.step,
    staged_steps.stage,
    share.value as share,
    share.low as low,
    share.high as high,
    by_position,
    independent,
    num_high,
    num_tokens,
    num_prompts,
    boundary_step,
    boundary_low,
    boundary_high
  from per_step
  join staged_steps on staged_steps.run_id = per_step.run_id and staged_steps.step = per_step.step
  where $stage is null or staged_steps.stage = $stage
  order by run_id, step
)
select * from final
