"""What commands print: progress, exported tables, and interruption."""
