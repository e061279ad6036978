"""Read the dumps of other trainers, and record them as traces."""
