"""Import rollouts that other trainers sampled."""
