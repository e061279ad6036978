-- question: S5. How much of all movement of token probabilities lies in the 1, 5 and 20 % of tokens that move most?
-- grain: one row per run, stage and top share (0.01, 0.05, 0.2), over tokens with after-update values
-- params: $runs list of run_id, null = all; $stage rising or plateau, null = both
-- units: share, low, high, even, normal in [0, 1] of all |dp| (95 % interval, clustered by prompt); threshold in |dp|
-- needs: after-update values
with moved as (
  select run_id, stage, prompt_id, abs(dp) as movement
  from staged_movements
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
-- normal: share of the sum of |Z| in its top q for a standard normal Z, exp(-z^2 / 2) with P(|Z| > z) = q.
tops as (
  select tier, top::double as top, normal::double as normal
  from (values (3, 0.01, 0.03624520), (2, 0.05, 0.14650006), (1, 0.2, 0.43990908)) as _ (tier, top, normal)
),
-- The bin's lower edge is taken, so that a threshold is at most 0.1 % too low.
bins as (
  select run_id, stage, floor(1000 * ln(greatest(movement, 1e-12)))::integer as bin, count(*) as tokens
  from moved
  group by all
),
ranked as (
  select
    *,
    sum(tokens) over (partition by run_id, stage order by bin desc) - tokens as tokens_above,
    sum(tokens) over (partition by run_id, stage) as tokens_all
  from bins
),
thresholds as (
  select
    run_id,
    stage,
    exp(min(bin) filter (where tokens_above < 0.01 * tokens_all) / 1000) as top_1,
    exp(min(bin) filter (where tokens_above < 0.05 * tokens_all) / 1000) as top_5,
    exp(min(bin) filter (where tokens_above < 0.2 * tokens_all) / 1000) as top_20
  from ranked
  group by all
),
-- tier: how many of the three thresholds a token reaches.
per_tier as (
  select
    run_id,
    stage,
    prompt_id,
    (movement >= top_1)::integer + (movement >= top_5)::integer + (movement >= top_20)::integer as tier,
    sum(movement) as movement,
    count(*) as tokens
  from moved
  join thresholds using (run_id, stage)
  group by all
),
thresholds_by_top as (
  select run_id, stage, tier, top, normal, case tier when 3 then top_1 when 2 then top_5 else top_20 end as threshold
  from thresholds, tops
),
-- top_movement adds up to what exactly the top share moves, ties at the threshold shared out, and hardly depends on the
-- threshold's own error.
per_prompt as (
  select
    run_id,
    stage,
    top,
    normal,
    threshold,
    prompt_id,
    coalesce(sum(movement) filter (where per_tier.tier >= thresholds_by_top.tier), 0)
      - threshold * coalesce(sum(tokens) filter (where per_tier.tier >= thresholds_by_top.tier), 0)
      + top * threshold * sum(tokens) as top_movement,
    sum(movement) as movement,
    sum(tokens) as tokens
  from per_tier
  join thresholds_by_top using (run_id, stage)
  group by run_id, stage, top, normal, threshold, prompt_id
),
final as (
  select
    run_id,
    stage,
    top,
    clustered_mean(top_movement, movement) as share,
    as_share(clustered_low(top_movement, movement)) as low,
    as_share(clustered_high(top_movement, movement)) as high,
    top as even,
    normal,
    threshold,
    sum(tokens)::bigint as num_tokens,
    count(*) as num_prompts
  from per_prompt
  group by all
  order by run_id, stage desc, top
)
select * from final
