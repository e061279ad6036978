"""Set when tests give up on a process, a thread, or a response."""

# Ends a test that hangs. It does not measure speed: other tests share the cores.
HANG_S = 300.0
