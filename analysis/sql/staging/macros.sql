-- Ratio sum(s) / sum(n) over clusters, one input row a cluster, with the standard error of a ratio estimator
-- (Cochran 1977, 6.4): clusters are independent, what lies within one is not.
create macro clustered_mean(s, n) as sum(s) / nullif(sum(n), 0);
create macro clustered_se(s, n) as
  sqrt(
    count(*) / nullif(count(*) - 1, 0)
    * greatest(
        sum(s * s) - 2 * clustered_mean(s, n) * sum(s * n) + clustered_mean(s, n) * clustered_mean(s, n) * sum(n * n),
        0
      )
  ) / nullif(sum(n), 0);
create macro clustered_low(s, n) as clustered_mean(s, n) - 1.96 * clustered_se(s, n);
create macro clustered_high(s, n) as clustered_mean(s, n) + 1.96 * clustered_se(s, n);

-- Unbiased pass@k (Chen et al. 2021): 1 - C(n - c, k) / C(n, k), as the product over the k draws of "wrong again".
create macro pass_at_k(n, c, k) as
  1 - list_product(list_transform(range(k), lambda i: greatest(n - c - i, 0) / (n - i)));

-- Share in [0, 1]: an interval does not leave it. (greatest and least would turn null into a bound.)
create macro as_share(x) as if(x is null, null, least(greatest(x, 0), 1));

-- Whether a token's category counts as reasoning (claims S3, I1).
create macro is_reasoning(category) as category in ('formal_reasoning', 'logical_structuring', 'metacognitive');
