"""Launch the runs of a grid as local processes or as tasks of a Ray cluster."""
