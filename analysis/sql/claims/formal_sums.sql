-- question: M3. Which share of each prompt's tokens is formal reasoning in the last steps of a run?
-- grain: one row per run and prompt, over the last $last_steps steps
-- params: $runs: list of run_id (default all); $last_steps: integer in [1, 1000000], steps (default 10)
-- units: num_tokens, num_formal in tokens, weighted to count for all responses of their step
-- needs: tokens, token categories
with last_steps as (
  select run_id, max(step) - coalesce($last_steps, 10)::integer as after_step
  from steps
  where $runs is null or list_contains($runs, run_id)
  group by all
),
per_step as (
  select
    tokens.run_id,
    tokens.step,
    tokens.prompt_id,
    count(*) as num_tokens,
    count(*) filter (where tokens.category = 'formal_reasoning') as num_formal
  from tokens
  join last_steps on last_steps.run_id = tokens.run_id and tokens.step > last_steps.after_step
  group by all
),
final as (
  select
    run_id,
    prompt_id,
    sum(num_tokens * num_responses / num_with_tokens) as num_tokens,
    sum(num_formal * num_responses / num_with_tokens) as num_formal
  from per_step
  join token_coverage using (run_id, step)
  group by all
  order by all
)
select * from final
