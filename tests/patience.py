"""Limit how long a test waits for a process, a thread, or an answer."""

# Ends a test that hangs. It does not measure speed: other tests share the cores.
HANG_S = 300.0
