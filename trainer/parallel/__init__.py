"""Training in several processes: ranks, sharded weights, gradients."""
