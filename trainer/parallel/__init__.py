"""Training in several processes: ranks, sharded weights, gradient sums."""
