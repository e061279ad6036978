-- question: S1. Does training have a rising stage, in which entropy falls fast and accuracy rises fast, and then a
--   plateau?
-- grain: one row per run and step
-- params: $runs: list of run_id (default all); $stage: rising or plateau (default both)
-- units: entropy_token_mean, entropy_fit in nats per token; accuracy, accuracy_fit, format_rate in [0, 1]; boundary_*
--   in steps
-- needs: steps
with steps_of_runs as (
  select *
  from staged_steps
  where ($runs is null or list_contains($runs, run_id)) and ($stage is null or stage = $stage)
),
fitted as (
  select
    s.run_id,
    runs.arm,
    runs.seed,
    s.step,
    s.stage,
    s.entropy_token_mean,
    stages.entropy_start + stages.entropy_slope * (s.step - stages.first_step) as entropy_fit,
    s.accuracy,
    stages.accuracy_start + stages.accuracy_slope * (s.step - stages.first_step) as accuracy_fit,
    s.format_rate,
    s.boundary_step,
    s.boundary_low,
    s.boundary_high
  from steps_of_runs as s
  join stages on stages.run_id = s.run_id and stages.stage = s.stage
  left join runs on runs.run_id = s.run_id
),
final as (
  select *
  from fitted
  order by run_id, step
)
select * from final
