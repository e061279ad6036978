"""Where the runs of a grid are carried out: processes of this machine, or tasks of a Ray cluster."""
