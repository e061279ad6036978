-- question: I1. In the plateau, how much more often is the low-perplexity half of each mixed group correct?
-- grain: one row per run, step, and group with correct and incorrect responses
-- params: $runs: list of run_id (default all)
-- units: difference in [-1, 1]: accuracy of the half with lower length-adjusted perplexity minus accuracy of the other
--   half; num_groups is 1
-- needs: responses, perplexities, correctness
with ranked as (
  select
    *,
    row_number() over (partition by run_id, group_id order by surprisal_at_length, sample_index) as ppl_rank,
    count(*) over (partition by run_id, group_id) as group_size
  from responses_at_length
  where stage = 'plateau' and is_correct is not null and ($runs is null or list_contains($runs, run_id))
),
-- The middle response of a group of odd size belongs to neither half.
final as (
  select
    run_id,
    step,
    any_value(prompt_id) as prompt_id,
    avg(is_correct::integer) filter (where ppl_rank <= group_size // 2)
    - avg(is_correct::integer) filter (where ppl_rank > group_size - group_size // 2) as difference,
    1 as num_groups
  from ranked
  group by run_id, step, group_id
  having bool_or(is_correct) and not bool_and(is_correct)
  order by run_id, step, group_id
)
select * from final
