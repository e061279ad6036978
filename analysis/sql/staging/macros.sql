-- Scalar functions that the questions share; each returns one value per row.

-- Contribution of one prompt at one step to a mean, as a total over a count. estimate(list(step_prompt(...))) and the
-- other estimate functions return the mean with its 95% interval; see analysis/statistics/interval_functions.py.
create macro step_prompt(step, prompt_id, total, count) as (
  {'step': step, 'prompt': hash(prompt_id), 'total': total::double, 'count': count::double}
);

-- Unbiased pass@k (Chen et al. 2021) in [0, 1]: 1 - C(n - c, k) / C(n, k) for c correct of n samples, as a product over
-- the k draws of the probability that a draw is incorrect.
create macro pass_at_k(n, c, k) as (
  1 - list_product(list_transform(range(k), lambda i: greatest(n - c - i, 0) / (n - i)))
);

-- True if a token category counts as reasoning (claims S3, I1).
create macro is_reasoning(category) as category in ('formal_reasoning', 'logical_structuring', 'metacognitive');

-- Sign of the group-relative advantage of a response: 'positive' or 'negative'; null for a zero advantage or a response
-- outside the update.
create macro sign_of(is_kept, advantage) as (
  case when is_kept and advantage > 0 then 'positive' when is_kept and advantage < 0 then 'negative' end
);

-- A double rounded to the 8-bit mantissa of bfloat16, by Veltkamp's splitting with 2^45 + 1 (Dekker, Numer. Math. 18,
-- 1971).
create macro to_short_mantissa(x) as x * 35184372088833.0::double - (x * 35184372088833.0::double - x);

-- True if a number fits into the mantissa of bfloat16.
create macro has_short_mantissa(x) as x::double = to_short_mantissa(x::double);

-- Bin (0 to 79) of p (1 - p) in quarter octaves below 1/4. Random logit changes move a token of probability p in
-- proportion to p (1 - p).
create macro potential_bin(p) as greatest(0, least(79, floor(-4 * log2(4 * greatest(p * (1 - p), 1e-12)))))::integer;

-- Bin (0 to bins - 1) of a position in a response cut into equal bins. The product comes first: as a quotient times
-- bins, 29 / 100 * 100 is below 29.
create macro bin_of_position(place, response_length, bins) as (
  (place::bigint * bins::bigint // response_length)::integer
);

-- Label of a series of interventions: checkpoint, selection, seed, and temperature.
create macro intervention_series(checkpoint_step, selection, seed, temperature) as (
  concat_ws(', ', 'checkpoint ' || checkpoint_step, selection, 'seed ' || seed, 'temperature ' || temperature)
);
