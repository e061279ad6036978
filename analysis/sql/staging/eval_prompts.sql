-- One row per evaluated prompt, over its first k samples, or as many as there are (num_samples). maj_at_k: the most
-- frequent answer wins, a missing answer has no vote; among tied answers the expected correctness of a fair draw; 0
-- where no sample has an answer. pass_at_k is estimated from all samples.
create macro eval_prompts(k) as table
with samples as (
  select *
  from evals
  qualify row_number() over (partition by run_id, benchmark, step, prompt_id order by sample_index) <= k
),
votes as (
  select run_id, benchmark, step, prompt_id, answer, count(*) as num_votes, avg(is_correct::integer) as correctness
  from samples
  where answer is not null
  group by all
),
winners as (
  select run_id, benchmark, step, prompt_id, avg(correctness) as maj_at_k
  from (
    select *
    from votes
    qualify num_votes = max(num_votes) over (partition by run_id, benchmark, step, prompt_id)
  )
  group by all
),
scored as (
  select
    run_id,
    benchmark,
    step,
    prompt_id,
    count(*) as num_samples,
    sum(is_correct::integer) as num_correct,
    avg(response_length) as response_length,
    avg(entropy_mean) as entropy
  from samples
  group by all
),
all_samples as (
  select run_id, benchmark, step, prompt_id, count(*) as n, sum(is_correct::integer) as c
  from evals
  group by all
)
select
  scored.*,
  scored.num_correct / scored.num_samples as avg_at_k,
  coalesce(winners.maj_at_k, 0) as maj_at_k,
  pass_at_k(all_samples.n, all_samples.c, least(k, all_samples.n)) as pass_at_k
from scored
join all_samples using (run_id, benchmark, step, prompt_id)
left join winners using (run_id, benchmark, step, prompt_id);

-- The same at the last evaluation of each run and benchmark.
create macro last_eval_prompts(k) as table
select *
from eval_prompts(k)
qualify step = max(step) over (partition by run_id, benchmark);
