"""Fast tensor operations: token statistics, packing, attention, norms; imports nothing else of the trainer."""
