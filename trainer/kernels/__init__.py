"""Fast tensor operations: token statistics, sequence packing, attention, norms. Imports nothing else of the trainer."""
