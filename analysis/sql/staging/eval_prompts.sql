-- What is the outcome of each held-out prompt?
-- One row per run, benchmark, step, and prompt, over the first k samples or all if there are fewer. num_samples counts
-- the samples of known correctness; a prompt without any is left out. avg_at_k, maj_at_k, and pass_at_k are in [0, 1],
-- response_length is in tokens, entropy in nats per token.
--
-- maj_at_k is the correctness of the most frequent answer. All correct answers count as one answer. Incorrect answers
-- count as one if they have equal classes, or equal texts if they have no class. A missing answer or one of unknown
-- correctness has no vote. A tie counts as the expected correctness of a fair draw; without any vote, maj_at_k is 0.
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

-- What is the outcome of each held-out prompt at the last evaluation?
-- One row per run, benchmark, and prompt, with the columns of eval_prompts.
create macro last_eval_prompts(k) as table
  select *
  from eval_prompts(k)
  qualify step = max(step) over (partition by run_id, benchmark);
