-- One row per evaluated prompt, over its first k samples, or as many as there are; num_samples counts those of known
-- correctness, and a prompt without any is left out. maj_at_k: the most frequent answer wins. Correct answers share one
-- vote; wrong answers share one where they have the same class, or the same text if they have no class; a missing answer
-- or an unknown correctness has no vote. Ties give the expected correctness of a fair draw; 0 where nothing has a vote.
-- pass_at_k is estimated from all samples.
create macro eval_prompts(k) as table
with samples as (
  select *
  from evals
  qualify row_number() over (partition by run_id, benchmark, step, prompt_id order by sample_index) <= k
),
votes as (
  select
    run_id,
    benchmark,
    step,
    prompt_id,
    is_correct,
    if(is_correct, null, answer_class) as wrong_class,
    if(is_correct or answer_class is not null, null, answer) as wrong_text,
    count(*) as num_votes
  from samples
  where answer is not null and is_correct is not null
  group by all
),
winners as (
  select run_id, benchmark, step, prompt_id, avg(is_correct::integer) as maj_at_k
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
    count(is_correct) as num_samples,
    sum(is_correct::integer) as num_correct,
    avg(response_length) as response_length,
    avg(entropy_mean) as entropy
  from samples
  group by all
  having count(is_correct) > 0
),
all_samples as (
  select run_id, benchmark, step, prompt_id, count(is_correct) as n, sum(is_correct::integer) as c
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
