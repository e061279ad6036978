-- At which place among the samples of its held-out prompt is each sample?
-- One row per sample, with the columns of evals and place, from 1 on.
create view ranked_evals as
select
  *,
  row_number() over (partition by run_id, benchmark, step, prompt_id order by sample_index) as place
from evals;

-- What are the means of each held-out prompt?
-- One row per run, benchmark, step, and prompt, over the first k samples or all if there are fewer. num_samples counts
-- the samples of known correctness; a prompt without any is left out. avg_at_k is in [0, 1], response_length in tokens,
-- entropy in nats per token. num_recorded and num_recorded_correct count all samples of known correctness.
create macro eval_means(k) as table
  select
    run_id,
    benchmark,
    step,
    prompt_id,
    count(is_correct) filter (where place <= k) as num_samples,
    sum(is_correct::integer) filter (where place <= k) as num_correct,
    avg(response_length) filter (where place <= k) as response_length,
    avg(entropy_mean) filter (where place <= k) as entropy,
    avg(is_correct::integer) filter (where place <= k) as avg_at_k,
    count(is_correct) as num_recorded,
    sum(is_correct::integer) as num_recorded_correct
  from ranked_evals
  group by all
  having count(is_correct) filter (where place <= k) > 0;

-- What are the means of each held-out prompt at the last evaluation?
-- One row per run, benchmark, and prompt, with the columns of eval_means.
create macro last_eval_means(k) as table
  select *
  from eval_means(k)
  qualify step = max(step) over (partition by run_id, benchmark);

-- What is the outcome of each held-out prompt?
-- One row per run, benchmark, step, and prompt, with the columns of eval_means, maj_at_k, and pass_at_k, in [0, 1].
--
-- maj_at_k is the correctness of the most frequent answer. All correct answers count as one answer. Incorrect answers
-- count as one if they have equal classes, or equal texts if they have no class. A missing answer or one of unknown
-- correctness has no vote. A tie counts as the expected correctness of a fair draw; without any vote, maj_at_k is 0. If
-- samples of a benchmark are correct and none has an answer, the run did not record answers, and maj_at_k is null.
-- pass_at_k is estimated from all samples.
create macro eval_prompts(k) as table
  with votes as (
    select
      run_id,
      benchmark,
      step,
      prompt_id,
      is_correct,
      if(is_correct, null, answer_class) as wrong_class,
      if(is_correct or answer_class is not null, null, answer) as wrong_text,
      count(*) as num_votes
    from ranked_evals
    where place <= k and answer is not null and is_correct is not null
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
  without_answers as (
    select run_id, benchmark
    from evals
    group by all
    having count(answer) = 0 and bool_or(is_correct)
  )
  select
    run_id,
    benchmark,
    step,
    prompt_id,
    num_samples,
    num_correct,
    response_length,
    entropy,
    avg_at_k,
    if(without_answers.run_id is null, coalesce(maj_at_k, 0), null) as maj_at_k,
    pass_at_k(num_recorded, num_recorded_correct, least(k, num_recorded)) as pass_at_k
  from eval_means(k)
  left join winners using (run_id, benchmark, step, prompt_id)
  left join without_answers using (run_id, benchmark);

-- What is the outcome of each held-out prompt at the last evaluation?
-- One row per run, benchmark, and prompt, with the columns of eval_prompts.
create macro last_eval_prompts(k) as table
  select *
  from eval_prompts(k)
  qualify step = max(step) over (partition by run_id, benchmark);
