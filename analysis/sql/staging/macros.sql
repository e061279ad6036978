-- What a prompt adds to a mean at a step: a total over a count. estimate(list(step_prompt(...))) and its relatives give
-- the mean with its 95 % interval; see analysis/interval_functions.py.
create macro step_prompt(step, prompt_id, total, count) as
  {'step': step, 'prompt': hash(prompt_id), 'total': total::double, 'count': count::double};

-- Unbiased pass@k (Chen et al. 2021): 1 - C(n - c, k) / C(n, k), as the product over the k draws of "wrong again".
create macro pass_at_k(n, c, k) as
  1 - list_product(list_transform(range(k), lambda i: greatest(n - c - i, 0) / (n - i)));

-- Whether a token's category counts as reasoning (claims S3, I1).
create macro is_reasoning(category) as category in ('formal_reasoning', 'logical_structuring', 'metacognitive');

-- Whether a number has no more mantissa than bfloat16 keeps (8 bits): its resolution is then 2^-8 of its size.
create macro has_short_mantissa(x) as
  x = 0 or mod(128 * abs(x::double) / pow(2, floor(log2(abs(x::double)))), 1) = 0;

-- Bin of p (1 - p) in quarter octaves below 1/4: how far random logit changes would move a token of probability p.
create macro potential_bin(p) as greatest(0, least(79, floor(-4 * log2(4 * greatest(p * (1 - p), 1e-12)))))::integer;

-- What sets one series of interventions apart from another.
create macro intervention_series(checkpoint_step, selection, seed, temperature) as
  concat_ws(', ', 'checkpoint ' || checkpoint_step, selection, 'seed ' || seed, 'temperature ' || temperature);
