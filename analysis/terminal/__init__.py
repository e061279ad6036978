"""Show progress, export tables, and handle Ctrl-C for the commands."""
